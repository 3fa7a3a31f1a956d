"""Machines that are network namespaces: each has a name, an address and a link to one switch.

    with lan("10.81.0") as net:
        alice = net.start("alice", ["blyan-node", "start"], environment={…})
        alice.run("ping", "-c1", "bob")

A machine is one process in namespaces of its own (network, host name, mounts); the switch is a
bridge in another. All are inside one user namespace, so no root is needed where the system lets
people make those. Nothing has to be cleaned up: a namespace goes with its last process, the kernel
ends the processes when the test's main thread ends, however it does, and nothing is named in /run.
`run` is for what a test does to a machine, `worsen` for what it does to its cable.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

TOOLS = ("ip", "mount", "nsenter", "setpriv", "sh", "unshare")
BRIDGE = "switch"
# Waits in its new namespaces until they are furnished, then becomes the machine's program.
_WAIT = 'echo here; read go; exec "$@" </dev/null >&2'
_DIES_WITH_US = ("setpriv", "--pdeathsig", "KILL")


class NamespaceFailed(AssertionError):
    """A command that sets up or changes a machine failed."""


def unavailable() -> str | None:
    """Why there can be no machines here; None if there can."""
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} is not installed"
    try:
        with lan("10.81.255") as net:
            net.start("probe", ["sleep", "60"]).run("ip", "address")
    except NamespaceFailed as error:
        return f"namespaces are not allowed here: {error}"
    return None


@dataclass
class Machine:
    """One machine; its program is `process`, and ends with it."""

    name: str
    address: str
    process: subprocess.Popen[bytes]

    def enter(self, *words: str) -> list[str]:
        """The command line that runs `words` on this machine."""
        where = ["nsenter", "--target", str(self.process.pid), "--user", "--preserve-credentials"]
        return [*where, "--net", "--uts", "--mount", *words]

    def run(self, *words: str) -> str:
        """Runs a command on this machine and returns what it says; raises `NamespaceFailed`."""
        return _run(self.enter(*words))

    def kill(self) -> None:
        """Ends the machine at once, as a power cut would."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Mount:
    """A file or folder of ours that is to be seen on a machine."""

    source: Path
    read_only: bool = False


@dataclass
class Lan:
    """The switch, and the machines on it by name."""

    subnet: str
    switch: Machine
    hosts: Path
    machines: dict[str, Machine] = field(default_factory=dict)
    _addresses: dict[str, str] = field(default_factory=dict)
    _homes: dict[str, str] = field(default_factory=dict)
    _cables: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(
        self,
        name: str,
        program: Sequence[str],
        *,
        environment: Mapping[str, str] | None = None,
        mounts: Mapping[str, Mount] | None = None,
        read_only: bool = False,
        log: Path | None = None,
        behind: str | None = None,
    ) -> Machine:
        """Starts a machine that runs `program`; one of the name that ended keeps its address.

        `mounts` say what is to be seen at a path of the machine; a folder in which there is such a
        path shows nothing else. With `read_only`, the machine can write to mounts alone. What the
        program says goes to `log`. `behind` names a router whose home it is in.
        """
        new = ["unshare", "--net", "--uts", "--mount", *_DIES_WITH_US, "sh", "-c", _WAIT, "sh"]
        subnet = self.subnet if behind is None else self._homes[behind]
        address = self._addresses.setdefault(name, f"{subnet}.{len(self._addresses) + 2}")
        process = _waiting(self._inside(*new, *program), environment, log)
        machine = self.machines[name] = Machine(name, address, process)
        try:
            self._plug_in(machine, self.switch if behind is None else self.machines[behind])
            if behind is not None:
                machine.run("ip", "route", "add", "default", "via", f"{subnet}.1")
            _furnish(machine, {"/etc/hosts": Mount(self.hosts, True), **(mounts or {})})
            if read_only:
                machine.run("mount", "-o", "remount,bind,ro", "/")
        except NamespaceFailed:
            machine.kill()
            raise
        _let_go(process)
        return machine

    def start_router(self, name: str, home: str) -> Machine:
        """A machine that others can be behind: `home` are the three numbers of their network.

        They reach everybody, under the router's address; nobody can dial them. Raises
        `NamespaceFailed` where the kernel translates no addresses.
        """
        router = self.start(name, ["sleep", "infinity"])
        router.run(sys.executable, "-m", "blyan_node.testing.masquerade", "eth0")
        router.run("ip", "link", "add", BRIDGE, "type", "bridge")
        router.run("ip", "address", "add", f"{home}.1/24", "dev", BRIDGE)
        router.run("ip", "link", "set", BRIDGE, "up")
        self._homes[name] = home
        return router

    def unplug(self, name: str) -> None:
        """Takes the machine's cable out of the switch."""
        self.switch.run("ip", "link", "set", self._port(name), "down")

    def plug(self, name: str) -> None:
        """Puts it back."""
        self.switch.run("ip", "link", "set", self._port(name), "up")

    def worsen(
        self, name: str, *, delay_ms: float = 0, loss: float = 0, dial_in: bool = True
    ) -> None:
        """Replaces the machine's cable by one that is slow, loses frames, or lets nobody dial in.

        The delay and the loss (a share) hold each way; see `blyan_node.testing.wire`.
        """
        port = self._port(name)
        near, far = f"{port}n", f"{port}f"
        wire = (sys.executable, "-m", "blyan_node.testing.wire")
        if (before := self._cables.pop(name, None)) is not None:
            _end(before)
        else:
            self.switch.run("ip", "link", "add", near, "type", "veth", "peer", "name", far)
            self.switch.run(*wire, "plain", far)
            self.machines[name].run(*wire, "plain", "eth0")
            for end in (near, far):
                self.switch.run("ip", "link", "set", end, "up")
            self.switch.run("ip", "link", "set", port, "nomaster")
            self.switch.run("ip", "link", "set", far, "master", BRIDGE)
        how = ["--delay-ms", str(delay_ms), "--loss", str(loss)]
        how += [] if dial_in else ["--no-dial-in"]
        line = self.switch.enter(*_DIES_WITH_US, *wire, "cable", port, near, *how)
        cable = self._cables[name] = subprocess.Popen(line, stdout=subprocess.PIPE)
        assert cable.stdout is not None
        if cable.stdout.readline() != b"ready\n":
            raise NamespaceFailed(f"the cable of {name} ended with {cable.wait()}")

    def _port(self, name: str) -> str:
        return f"port{self._addresses[name].rpartition('.')[2]}"

    def _plug_in(self, machine: Machine, switch: Machine) -> None:
        port, pid = self._port(machine.name), str(machine.process.pid)
        # The port of a machine that has just ended may be there for a moment longer.
        if f" {port}@" in switch.run("ip", "link"):
            switch.run("ip", "link", "delete", port)
        link = ["type", "veth", "peer", "name", "eth0", "netns", pid]
        switch.run("ip", "link", "add", port, *link)
        switch.run("ip", "link", "set", port, "master", BRIDGE, "up")
        machine.run("ip", "link", "set", "lo", "up")
        machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "eth0")
        machine.run("ip", "link", "set", "eth0", "up")
        machine.run("hostname", machine.name)
        lines = [f"{address} {name}\n" for name, address in self._addresses.items()]
        self.hosts.write_text("127.0.0.1 localhost\n" + "".join(lines))

    def _inside(self, *words: str) -> list[str]:
        """Into the user namespace alone: what is new is then owned by it."""
        where = ["nsenter", "--target", str(self.switch.process.pid), "--user"]
        return [*where, "--preserve-credentials", *words]


@contextmanager
def lan(subnet: str) -> Iterator[Lan]:
    """A switch without machines; `subnet` are three numbers. Whatever it has ends with the block.

    Raises `NamespaceFailed` where the system does not allow it.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lan-")))
        new = ["unshare", "--user", "--map-root-user", "--net", "--uts", "--mount"]
        line = [*new, *_DIES_WITH_US, "sh", "-c", _WAIT, "sh", "sleep", "infinity"]
        switch = Machine("switch", "", _waiting(line, None, None))
        net = Lan(subnet, switch, folder / "hosts")
        stack.callback(_end_all, net)
        switch.run("ip", "link", "add", BRIDGE, "type", "bridge")
        switch.run("ip", "link", "set", BRIDGE, "up")
        _let_go(switch.process)
        yield net


def _end_all(net: Lan) -> None:
    for cable in net._cables.values():
        _end(cable)
    for machine in (*net.machines.values(), net.switch):
        machine.kill()


def _end(cable: subprocess.Popen[bytes]) -> None:
    cable.kill()
    cable.communicate()


def _furnish(machine: Machine, mounts: Mapping[str, Mount]) -> None:
    """Shows files and folders of ours at paths of the machine, which need not exist outside."""
    new = [target for target in mounts if not Path(target).is_file()]
    for folder in dict.fromkeys(str(Path(target).parent) for target in new):
        machine.run("mount", "-t", "tmpfs", "tmpfs", folder)
    for target, mount in mounts.items():
        if target in new:
            machine.run(*(("mkdir",) if mount.source.is_dir() else ("touch",)), target)
        machine.run("mount", "--bind", str(mount.source), target)
        if mount.read_only:
            machine.run("mount", "-o", "remount,bind,ro", target)


def _waiting(
    line: Sequence[str], environment: Mapping[str, str] | None, log: Path | None
) -> subprocess.Popen[bytes]:
    """Starts a program that waits to be let go, and returns when it is in its namespaces."""
    reading, writing = os.pipe()
    with open(log or os.devnull, "ab") as said:
        process = subprocess.Popen(
            [*line], stdin=subprocess.PIPE, stdout=writing, stderr=said, env=environment
        )
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        if told.readline() != b"here\n":
            raise NamespaceFailed(f"{' '.join(line[:6])} … ended with {process.wait()}")
    return process


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    with process.stdin as waiting:
        waiting.write(b"go\n")


def _run(line: Sequence[str]) -> str:
    done = subprocess.run([*line], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip()[-500:]
        raise NamespaceFailed(f"{' '.join(line[-6:])}: exit {done.returncode}: {said}")
    return done.stdout
