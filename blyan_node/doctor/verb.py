"""`blyan-node doctor`: the home's checks, and the node's own if it runs."""

import json
from pathlib import Path

import msgspec

from blyan_node.config import Config
from blyan_node.doctor import outside
from blyan_node.home import open_home
from blyan_node.rpc.ask import ask
from blyan_node.settings import Settings
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.rpc import telling
from protocols.rpc.doctor import DoctorResult, Finding

EXIT_BAD = 1
ANSWER_S_MAX = 90.0
_MARKS = {"ok": "ok  ", "warn": "warn", "bad": "BAD "}


def doctor(home: Path, *, rpc: Path | None, as_json: bool) -> int:
    """Examines a node, prints what it finds, and returns 1 if anything is bad."""
    findings = examine(home, rpc)
    bad = sum(finding.verdict == "bad" for finding in findings)
    if as_json:
        document = {"ok": not bad, "findings": msgspec.to_builtins(findings)}
        print(json.dumps(document))
    else:
        for finding in findings:
            print("\n".join(_lines(finding)))
    return EXIT_BAD if bad else 0


def examine(home: Path, rpc: Path | None) -> list[Finding]:
    """Every check that can be made; a home that cannot be read ends them."""
    try:
        config = open_home(home, rpc=rpc, network=None, options=Settings())
    except (Refused, RemoteProtocolError, OSError) as error:
        return [outside.refusal_finding("home", error)]
    return [outside.check_key(config), *_of_the_node(config)]


def _of_the_node(config: Config) -> list[Finding]:
    try:
        result = ask(config.rpc, "node.doctor", {}, timeout_s=ANSWER_S_MAX)
    except TimeoutError:
        return [
            Finding(
                "node", "bad", "it runs and does not answer",
                f"nothing came within {ANSWER_S_MAX:.0f} s on {config.rpc}",
                "look into its log, and at what else the machine does",
            ),
            outside.check_disk(config),
        ]  # fmt: skip
    except OSError:
        return [
            outside.not_running(config.rpc),
            outside.check_network(config),
            outside.check_ports(config),
            outside.check_bootstrap(config),
            outside.check_disk(config),
        ]
    except Refused as refused:
        if refused.code is not ErrorCode.METHOD_NOT_FOUND:
            raise
        return [Finding("node", "warn", "it is of an older release", refused.why, "start it anew")]
    return [Finding("node", "ok", "it runs"), *msgspec.convert(result, DoctorResult).findings]


def _lines(finding: Finding) -> list[str]:
    lines = [f"{_MARKS[finding.verdict]}  {finding.name:<10} {finding.what}"]
    if finding.why:
        lines.append(f"        why: {finding.why}")
    if finding.next:
        lines.append(f"        next: {finding.next}")
    return [telling.one_line(line) for line in lines]
