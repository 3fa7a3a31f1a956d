"""The cable of the namespaces: what goes in comes out later, in order, less what is lost."""

import random

from blyan_node.testing.wire import Cable, opens_tcp

SYN, ACK = 0x02, 0x10


def segment(flags: int, protocol: int = 6) -> bytes:
    """An Ethernet frame with an IPv4 header without options and a bare TCP header."""
    ip = bytes([0x45, *bytes(8), protocol, *bytes(10)])
    return bytes(12) + b"\x08\x00" + ip + bytes(13) + bytes([flags]) + bytes(6)


def cable(loss: float = 0.0, dial_in: bool = True) -> Cable:
    return Cable(delay_s=0.0625, loss=loss, dial_in=dial_in, random=random.Random(1))


def test_frames_come_out_in_order_after_the_delay() -> None:
    line = cable()
    for number in range(3):
        line.take(1.0 + number / 100, towards_near=bool(number % 2), frame=bytes([number]))
    assert line.wait_s(1.0) == 0.0625
    assert list(line.out(1.0624)) == []
    assert list(line.out(1.0726)) == [(False, b"\x00"), (True, b"\x01")]
    assert list(line.out(2.0)) == [(False, b"\x02")]
    assert line.wait_s(2.0) is None


def test_the_share_that_is_lost() -> None:
    line = cable(loss=0.01)
    for _ in range(10_000):
        line.take(0.0, towards_near=True, frame=b"x")
    assert 9_850 <= len(list(line.out(1.0))) <= 9_950


def test_only_what_opens_a_connection_inwards_is_kept_out() -> None:
    line = cable(dial_in=False)
    kept_out = segment(SYN)
    let_in = [segment(SYN | ACK), segment(ACK), segment(SYN, protocol=17), b"short"]
    for frame in (kept_out, *let_in):
        line.take(0.0, towards_near=True, frame=frame)
    line.take(0.0, towards_near=False, frame=kept_out)
    assert [frame for _, frame in line.out(1.0)] == [*let_in, kept_out]
    assert opens_tcp(kept_out) and not any(opens_tcp(frame) for frame in let_in)
