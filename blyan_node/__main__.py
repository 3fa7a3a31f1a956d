"""`python -m blyan_node …`: the parts of the command that need more than the RPC.

`blyan-node start`, `init`, `testnet`, `fsck`, `block drop` and `bench` end up here. The command has
checked its own options; what they mean is checked here (`--set KEY=VALUE` is a key of `config.toml`
with a JSON value). Each verb imports what it needs when it runs: `init` needs neither torch nor
libp2p.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from blyan_node.config_file import ConfigError
from blyan_node.rpc.refusals import leaves_of, refusal_of_os
from blyan_node.settings import Settings, settings_of
from protocols.errors import ErrorCode, Refused, RemoteProtocolError
from protocols.rpc import telling

EXIT_REFUSED = 1
EXIT_USAGE = 3
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; errors are told, never shown as a traceback."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.verb(arguments)
        sys.stdout.flush()  # here, so that a reader who has left is noticed here
        return code
    except Refused as refused:
        return _tell(refused, arguments.json, EXIT_REFUSED)
    except ConfigError as error:
        told = f"cannot use {error.where}"
        bad = Refused(ErrorCode.BAD_INPUT, told, error.why, error.next, error.data)
        return _tell(bad, arguments.json, EXIT_USAGE)
    except RemoteProtocolError as error:
        bad = Refused(ErrorCode.BAD_INPUT, f"cannot use {error.where}", error.why)
        return _tell(bad, arguments.json, EXIT_USAGE)
    except BrokenPipeError:  # whoever read our output has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_REFUSED
    except OSError as error:
        return _tell(refusal_of_os(error), arguments.json, EXIT_REFUSED)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception as error:  # a bug of ours: told in words, its traceback goes to the log
        logging.getLogger("blyan_node").critical("ended by a bug", exc_info=error)
        return _tell(_bug(error), arguments.json, EXIT_REFUSED)


def _bug(error: Exception) -> Refused:
    found = leaves_of(error)[0] if isinstance(error, ExceptionGroup) else error
    return Refused(
        ErrorCode.INTERNAL,
        "blyan-node ended because of a bug in it",
        f"{type(found).__name__}: {found}"[:300],
        "please report it, with the log",
    )


def _tell(refused: Refused, as_json: bool, code: int) -> int:
    print("\n".join(telling.lines(refused)), file=sys.stderr)
    if as_json:
        print(telling.document(refused))
    return code


def _start(arguments: argparse.Namespace) -> int:
    from blyan_node.start import start

    return start(
        Path(arguments.home),
        rpc=_path(arguments.rpc),
        network=_path(arguments.network),
        options=_options(arguments.set),
        as_json=arguments.json,
        verbose=arguments.verbose,
    )


def _init(arguments: argparse.Namespace) -> int:
    from blyan_node.home import create_home

    options = _options(arguments.set)
    made = create_home(
        Path(arguments.home),
        role=options.role or "main",
        network=_path(arguments.network),
        psk=_path(options.psk),
    )
    return _print(made, arguments.json, "{role} node {peer_id}\n  home {home}\n  network {network}")


def _config_show(arguments: argparse.Namespace) -> int:
    from blyan_node.home import open_home
    from blyan_node.in_use import told

    home, rpc = Path(arguments.home), _path(arguments.rpc)
    config = open_home(home, rpc=rpc, network=None, options=_options(arguments.set))
    print(json.dumps(msgspec.to_builtins(told(config, running=False))))
    return 0


def _fsck(arguments: argparse.Namespace) -> int:
    from blyan_node.offline import fsck

    return fsck(Path(arguments.home), repair=arguments.repair, as_json=arguments.json)


def _doctor(arguments: argparse.Namespace) -> int:
    from blyan_node.doctor.verb import doctor

    return doctor(Path(arguments.home), rpc=_path(arguments.rpc), as_json=arguments.json)


def _block_drop(arguments: argparse.Namespace) -> int:
    from blyan_node.offline import block_drop

    return block_drop(Path(arguments.home), arguments.id, as_json=arguments.json)


def _testnet(arguments: argparse.Namespace) -> int:
    from blyan_node.testnet.verbs import run

    _end_in_order()
    return run(arguments, _options(arguments.set))


def _end_in_order() -> None:
    """SIGTERM ends us as Ctrl-C does: daemons that were started are ended first."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _bench(arguments: argparse.Namespace) -> int:
    from blyan_node.bench.__main__ import main

    _end_in_order()
    return main([*arguments.names, *(["--json"] if arguments.json else [])])


def _print(document: dict[str, Any], as_json: bool, plain: str) -> int:
    print(json.dumps(document) if as_json else plain.format(**document))
    return 0


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).absolute()


def _options(pairs: Sequence[str]) -> Settings:
    values = {}
    for pair in pairs:
        key, _, value = pair.partition("=")
        try:
            values[key] = json.loads(value)
        except ValueError:
            raise RemoteProtocolError(f"--set {key[:40]}", "its value is no JSON") from None
    return settings_of(values)


class _Parser(argparse.ArgumentParser):
    """Wrong usage is 3 here as for the command; 2 means that there is no node."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong."""
        self.exit(EXIT_USAGE, f"error: wrong usage\n  why: {message}\n")


def _parser() -> argparse.ArgumentParser:
    shared = _Parser(add_help=False)
    shared.add_argument("--home", default=str(Path("~/.blyan").expanduser()))
    shared.add_argument("--json", action="store_true")
    shared.add_argument("-v", "--verbose", action="store_true")
    shared.add_argument("--set", action="append", default=[], metavar="KEY=JSON")
    parser = _Parser(prog="python -m blyan_node", description=__doc__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, parents=[shared])
        added.set_defaults(verb=run)
        return added

    start = verb("start", _start)
    start.add_argument("--rpc")
    start.add_argument("--network")
    verb("config-show", _config_show).add_argument("--rpc")
    verb("init", _init).add_argument("--network")
    verb("fsck", _fsck).add_argument("--repair", action="store_true")
    verb("doctor", _doctor).add_argument("--rpc")
    verb("block-drop", _block_drop).add_argument("id")
    verb("bench", _bench).add_argument("names", nargs="*")
    testnet = verb("testnet", _testnet)
    testnet.add_argument("action", choices=("up", "status", "kill", "restart", "down"))
    testnet.add_argument("name", nargs="?")
    testnet.add_argument("--dir", required=True)
    testnet.add_argument("--nodes", type=int)
    testnet.add_argument("--roles")
    return parser


if __name__ == "__main__":
    sys.exit(main())
