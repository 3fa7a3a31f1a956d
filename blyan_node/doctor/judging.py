"""From what was seen to a verdict; no I/O and no clock."""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from protocols.limits import clock_drift_ms_max, disk_reserve_bytes, worker_queue_requests_max
from protocols.rpc.doctor import Finding, Verdict

CLOCK_WARN_MS = clock_drift_ms_max // 4
DISK_WARN_BYTES = 8 * disk_reserve_bytes
LAG_WARN_S, LAG_BAD_S = 0.25, 1.0
GOSSIP_LOST_WARN = 0.01
QUOTA_FULL = 0.95
_MIB = 1024 * 1024


@dataclass(frozen=True)
class BootstrapSeen:
    """A bootstrap address, whether its node is a peer, and why the last dial failed."""

    addr: str
    connected: bool
    why: str | None


@dataclass(frozen=True)
class LookSeen:
    """What one peer saw: our host, its clock less ours in ms (± error), dials by address."""

    peer: str
    host: str
    offset_ms: int
    error_ms: int
    tried: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PaceSeen:
    """How late the event loop is, in s, what waits, what was lost, threads and cores."""

    lag_s: float
    queue: int
    gossip_in: int
    gossip_dropped: int
    threads: int
    cores: int


def judge_bootstrap(seen: Sequence[BootstrapSeen], peers: int) -> Finding:
    """Whether the nodes to find others through are there."""
    dead = [one for one in seen if not one.connected]
    why = "; ".join(f"{one.addr}: {one.why or 'no answer yet'}" for one in dead)
    if not seen:
        verdict: Verdict = "ok" if peers else "warn"
        return Finding(
            "bootstrap", verdict, f"no bootstrap node is configured, {peers} peers",
            "" if peers else "this node has nobody to find others through",
            "" if peers else "give it one: --bootstrap, or `bootstrap` in config.toml",
        )  # fmt: skip
    if not dead:
        return Finding("bootstrap", "ok", f"connected to all {len(seen)} bootstrap nodes")
    if len(dead) < len(seen) or peers:
        return Finding(
            "bootstrap", "warn", f"{len(dead)} of {len(seen)} bootstrap nodes are not reached",
            why, "the node has other peers; take dead addresses out of `bootstrap`",
        )  # fmt: skip
    return Finding("bootstrap", "bad", "no bootstrap node is reached", why, _bootstrap_next(why))


def _bootstrap_next(why: str) -> str:
    if "private network" in why:
        return "give both nodes the same key file (--psk); its fingerprint is shown above"
    if "belongs to network" in why:
        return "start both with the same --network file"
    if "another peer id" in why:
        return "ask that node's operator for its address anew: `blyan-node id` shows it"
    if "allowed_peers" in why:
        return "have this node's id added to allowed_peers there, or that one's here"
    return "check that it runs and its port is open, or give the address of another node"


def judge_reach(
    looks: Sequence[LookSeen], listen: Sequence[str], announced: Sequence[str]
) -> Finding:
    """Whether peers that were asked to could connect to this node."""
    tried = [(look, addr, why) for look in looks for addr, why in look.tried]
    if not tried:
        return Finding(
            "reachable", "warn", "nobody has tried to connect to this node",
            "no peer was there to ask" if not looks else "no peer knew an address to try",
            "connect it to another node and run `doctor` again",
        )  # fmt: skip
    if good := [(look, addr) for look, addr, why in tried if not why]:
        look, addr = good[0]
        what = f"{look.peer} sees it at {look.host} and connected back to {addr}"
        return Finding("reachable", "ok", what)
    failed = "; ".join(f"{addr} from {look.peer}: {why}" for look, addr, why in tried)
    return Finding(
        "reachable", "bad", "peers cannot connect to this node", failed,
        _reach_next(tried[0][0].host, listen, announced),
    )  # fmt: skip


def _reach_next(seen_host: str, listen: Sequence[str], announced: Sequence[str]) -> str:
    port = announced[0].split("/")[4] if announced else listen[0].split("/")[4]
    if all(_is_loopback(addr) for addr in listen) and not _host_is_loopback(seen_host):
        return "it listens for this machine alone: --listen /ip4/0.0.0.0/tcp/4040"
    seen = f"/ip{6 if ':' in seen_host else 4}/{seen_host}/tcp/{port}"
    if seen_host not in [addr.split("/")[2] for addr in announced]:
        return (
            f"it is seen at {seen_host}, which is not its own address: forward TCP port {port} of "
            f"the router to this machine, and start with --announce {seen}"
        )
    return (
        f"open TCP port {port} in the firewall, and see that `announce` and `listen` name the same "
        "port, or the forwarded one"
    )


def judge_listen(listen: Sequence[str], announced: Sequence[str]) -> Finding:
    """Whether what a node tells others can mean anything to them."""
    if announced and all(_is_loopback(addr) for addr in announced):
        return Finding(
            "listen", "warn", "only programs on this machine can reach it",
            f"it tells others {', '.join(announced)}",
            "for others: --listen /ip4/0.0.0.0/tcp/4040",
        )  # fmt: skip
    return Finding("listen", "ok", f"others are told {', '.join(announced) or 'no address'}")


def judge_clock(looks: Sequence[LookSeen]) -> Finding:
    """Whether this node's clock agrees with its peers'."""
    if not looks:
        return Finding(
            "clock", "warn", "its clock could not be compared", "no peer was there to ask",
            "connect it to another node and run `doctor` again",
        )  # fmt: skip
    offset = int(median(look.offset_ms for look in looks))
    sure = max(0, abs(offset) - max(look.error_ms for look in looks))
    whose = f"{len(looks)} peers' clocks" if len(looks) > 1 else "the clock of its one peer"
    if sure <= CLOCK_WARN_MS:
        return Finding("clock", "ok", f"within {max(abs(offset), 1)} ms of {whose}")
    way = "behind" if offset > 0 else "ahead of"
    verdict: Verdict = "bad" if sure > clock_drift_ms_max else "warn"
    return Finding(
        "clock", verdict, f"its clock is {abs(offset) / 1000:.0f} s {way} {whose}",
        f"what is dated over {clock_drift_ms_max // 1000} s ahead of a node's clock waits there",
        "set the clock by a time server (`timedatectl set-ntp true`)"
        + ("" if len(looks) > 1 else ", here or at the peer"),
    )  # fmt: skip


def judge_disk(
    path: str, free: int, stored: int, quota: int | None, writable: bool = True
) -> Finding:
    """Whether there is room for what is to come, and whether it may be written."""
    room = f"{free // _MIB} MiB free at {path}"
    if not writable:
        return Finding(
            "disk", "bad", f"{path} cannot be written", "its permissions or its disk forbid it",
            "give this user the folder, mount the disk for writing, or move the home",
        )  # fmt: skip
    if free < disk_reserve_bytes:
        return Finding(
            "disk", "bad", f"the disk is full: {room}",
            f"{disk_reserve_bytes // _MIB} MiB are kept for the database; nothing is stored below",
            "free some space, or drop experts (`expert drop`) and move the home to another disk",
        )  # fmt: skip
    if quota is not None and stored > QUOTA_FULL * quota:
        return Finding(
            "disk", "bad", f"the store is full: {stored // _MIB} of {quota // _MIB} MiB",
            "`disk` bounds what it may take", "raise `disk`, or drop experts (`expert drop`)",
        )  # fmt: skip
    if free < DISK_WARN_BYTES:
        return Finding("disk", "warn", f"the disk is nearly full: {room}", "", "free some space")
    return Finding("disk", "ok", room)


def judge_pace(seen: PaceSeen) -> Finding:
    """Whether the node keeps up with what it is asked and told."""
    if seen.lag_s > LAG_WARN_S:
        verdict: Verdict = "bad" if seen.lag_s > LAG_BAD_S else "warn"
        more = f", and it computes with {seen.threads} threads on {seen.cores} cores"
        return Finding(
            "pace", verdict, f"it comes to its work {seen.lag_s:.1f} s late",
            "the machine is busy" + (more if seen.threads > seen.cores else ""),
            "give it fewer --threads, or other programs less to do",
        )  # fmt: skip
    if seen.queue > worker_queue_requests_max // 2:
        return Finding(
            "pace", "warn", f"{seen.queue} requests wait for its experts",
            "it is asked for more than it computes", "add nodes, or let it --hold fewer experts",
        )  # fmt: skip
    if seen.gossip_dropped > GOSSIP_LOST_WARN * max(seen.gossip_in, 100):
        return Finding(
            "pace", "warn", f"{seen.gossip_dropped} messages of {seen.gossip_in} were dropped",
            "they came faster than it took them in", "sync makes up for it; see `threads`",
        )  # fmt: skip
    if seen.threads > seen.cores:
        return Finding(
            "pace", "warn", f"{seen.threads} threads on {seen.cores} cores",
            "they wait for each other", f"--threads {seen.cores}",
        )  # fmt: skip
    return Finding("pace", "ok", f"{1000 * seen.lag_s:.0f} ms late, {seen.queue} waiting")


def _is_loopback(addr: str) -> bool:
    return _host_is_loopback(addr.split("/")[2])


def _host_is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
