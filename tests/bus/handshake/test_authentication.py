import os
from pathlib import Path

import msgspec
import pytest

from bus.errors import AuthenticationError
from bus.handshake.authentication import KeyFileError, KeyRing, write_key_file
from schemas.handshake import AgentMetadataRequest

REQUEST = AgentMetadataRequest(nonce=bytes(16), requester="prefill-1")
OLD, NEW = ("old", b"o" * 32), ("new", b"n" * 32)


def test_a_proof_holds_for_its_request_and_bytes_alone() -> None:
    ring = KeyRing((OLD,))
    reply = ring.sign(REQUEST, b"description")
    assert ring.verify(REQUEST, reply, peer="w") == b"description"
    for forged in (
        msgspec.structs.replace(reply, description=b"Description"),
        msgspec.structs.replace(reply, mac=bytes(32)),
        msgspec.structs.replace(reply, key_id="other"),
    ):
        with pytest.raises(AuthenticationError):
            ring.verify(REQUEST, forged, peer="w")
    for other in (
        msgspec.structs.replace(REQUEST, nonce=b"1" * 16),
        msgspec.structs.replace(REQUEST, requester="prefill-2"),
    ):
        with pytest.raises(AuthenticationError):
            ring.verify(other, reply, peer="w")


def test_two_keys_serve_while_they_rotate() -> None:
    before, during, after = KeyRing((OLD,)), KeyRing((NEW, OLD)), KeyRing((NEW,))
    assert during.verify(REQUEST, before.sign(REQUEST, b"d"), peer="w") == b"d"
    assert after.verify(REQUEST, during.sign(REQUEST, b"d"), peer="w") == b"d"
    with pytest.raises(AuthenticationError):
        after.verify(REQUEST, before.sign(REQUEST, b"d"), peer="w")


def test_a_key_file_is_the_owner_s_alone_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key_file(path)
    ring = KeyRing.load(str(path))
    write_key_file(path)
    assert KeyRing.load(str(path)).keys == ring.keys
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        KeyRing.load(str(path))


@pytest.mark.parametrize(
    "text", ["", "id", "id 00", "id zz\n", "a " + "0" * 64 + "\nb " + "1" * 64 + "\nc " + "2" * 64]
)
def test_a_malformed_key_file_is_told(tmp_path: Path, text: str) -> None:
    path = tmp_path / "key"
    path.write_text(text)
    os.chmod(path, 0o600)
    with pytest.raises(KeyFileError):
        KeyRing.load(str(path))


def test_no_key_is_shown() -> None:
    assert "oooo" not in repr(KeyRing((OLD,)))
