"""The key file of a private swarm: libp2p's format, and one error for anything else."""

import base64

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocols.errors import RemoteProtocolError
from protocols.psk import FILE_BYTES_MAX, fingerprint, parse_psk, psk_text

KEY = bytes(range(32))


@settings(deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_a_key_is_read_as_it_was_written(key: bytes) -> None:
    assert parse_psk(psk_text(key).encode()) == key


def test_the_forms_that_others_write() -> None:
    assert psk_text(KEY) == f"/key/swarm/psk/1.0.0/\n/base16/\n{KEY.hex()}\n"
    assert parse_psk(psk_text(KEY).upper().replace("KEY/SWARM/PSK", "key/swarm/psk")
                     .replace("BASE16", "base16").rstrip().encode()) == KEY  # fmt: skip
    text = base64.b64encode(KEY)
    assert parse_psk(b"/key/swarm/psk/1.0.0/\r\n/base64/\r\n" + text + b"\r\n") == KEY


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "first of three lines"),
        (b"/key/swarm/psk/2.0.0/\n/base16/\n" + b"00" * 32, "first of three lines"),
        (b"/key/swarm/psk/1.0.0/\n/base32/\n" + b"00" * 32, "second line"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"0g" * 32, "third line is not base16"),
        (b"/key/swarm/psk/1.0.0/\n/base64/\n!!!!", "third line is not base64"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"00" * 31, "31 bytes, not 32"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"00" * 32 + b"\n\n", "first of three lines"),
        (b"/key/swarm/psk/1.0.0/\n/base16/\n" + b"00" * 200, f"over {FILE_BYTES_MAX} bytes"),
        ("/key/swarm/psk/1.0.0/é".encode(), "not a text"),
    ],
)
def test_what_is_amiss_is_said(data: bytes, why: str) -> None:
    with pytest.raises(RemoteProtocolError, match=why):
        parse_psk(data)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_garbage_is_one_error(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="psk"):
        parse_psk(data)


def test_a_fingerprint_tells_two_keys_apart() -> None:
    assert len(fingerprint(KEY)) == 16
    assert fingerprint(KEY) != fingerprint(bytes(32))
    assert KEY.hex()[:16] not in fingerprint(KEY)
