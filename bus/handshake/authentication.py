"""The shared key, and the proof that a statement came from somebody who holds it.

In: a key file and a statement: a question, a description, a last word. Out: a MAC, or `AuthenticationError`.
What the handshake says is proved by HMAC-SHA256, what goes with every operation by a shorter tag, keyed BLAKE2b.
Either covers a label and every part that the statement means, among them the question's nonce and requester, so
that an answer can't be moved to another question nor a question's proof to an answer. The key proves membership of the
bus; *who* a member is comes from NATS permissions. NIXL must never see bytes without this proof: of 220 mutated blobs
handed to it, 3 killed the process and 52 were taken as good.
Format of a key file, mode 0600: one or two lines `<key id> <64 hex digits>`; the first signs, each verifies (rotation).
"""

import hashlib
import hmac
import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from bus.errors import AuthenticationError

_LABEL = b"nixlbus 2"
_KEY_BYTES = 32
_TAG_BYTES = 16
_MAX_KEYS = 2


class KeyFileError(ValueError):
    """A key file that is missing, malformed or readable by others; the text says what to do."""


@dataclass(frozen=True, slots=True, repr=False)
class KeyRing:
    """One or two keys by id. The first signs."""

    keys: tuple[tuple[str, bytes], ...]

    @classmethod
    def load(cls, path: str) -> "KeyRing":
        """Read a key file. Raises `KeyFileError`."""
        if not path:
            raise KeyFileError(
                "NIXLBUS_KEY_FILE is not set, and a worker that moves tensors needs one; "
                "take the one that 'nixlbus server' tells, or make one with: nixlbus nats-conf --out DIR"
            )
        try:
            mode = os.stat(path).st_mode
            lines = Path(path).read_text().split("\n")
        except OSError as error:
            raise KeyFileError(f"the key file {path} can't be read: {error.strerror}") from None
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise KeyFileError(f"the key file {path} is open to others (mode {mode & 0o777:o}); chmod 600 it")
        return cls(tuple(_parse(line, path) for line in lines if line.strip()))

    def __post_init__(self) -> None:
        if not 1 <= len(self.keys) <= _MAX_KEYS:
            raise KeyFileError(f"a key file holds 1 or {_MAX_KEYS} keys, not {len(self.keys)}")

    def sign(self, label: bytes, *parts: bytes) -> tuple[str, bytes]:
        """The id of the signing key, and the proof of `parts` as a statement of kind `label`."""
        key_id, key = self.keys[0]
        return key_id, _mac(key, label, parts)

    def verify(self, proof: tuple[str, bytes], label: bytes, *parts: bytes, peer: str) -> None:
        """Check a proof. Raises `AuthenticationError`, which names `peer`."""
        proof_key_id, mac = proof
        for key_id, key in self.keys:
            if key_id == proof_key_id and hmac.compare_digest(_mac(key, label, parts), mac):
                return
        raise AuthenticationError("a peer's statement carries no valid proof", peer=peer)

    def tag(self, label: bytes, *parts: bytes) -> bytes:
        """A short proof, 16 bytes, that a member of the bus made a statement; for what goes with every operation.

        Keyed BLAKE2b (RFC 7693), a third of what HMAC-SHA256 costs on so few bytes.
        """
        return _tag(self.keys[0][1], label, parts)

    def made(self, tag: bytes, label: bytes, *parts: bytes) -> bool:
        """Whether a member made this tag."""
        return any(hmac.compare_digest(tag, own) for own in self.tags(label, *parts))

    def tags(self, label: bytes, *parts: bytes) -> list[bytes]:
        """The same under each key, while they rotate."""
        return [_tag(key, label, parts) for _, key in self.keys]


def write_key_file(path: Path) -> None:
    """Make a key file with a fresh key, mode 0600; an existing one is left alone."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secrets.token_hex(4)} {secrets.token_hex(_KEY_BYTES)}\n")


def _parse(line: str, path: str) -> tuple[str, bytes]:
    key_id, _, digits = line.strip().partition(" ")
    try:
        key = bytes.fromhex(digits)
    except ValueError:
        key = b""
    if len(key) != _KEY_BYTES:
        raise KeyFileError(f"a line of the key file {path} is not '<key id> <{2 * _KEY_BYTES} hex digits>'")
    return key_id, key


def _tag(key: bytes, label: bytes, parts: tuple[bytes, ...]) -> bytes:
    if len(parts) > 1:
        parts = (b"".join([len(part).to_bytes(4, "big") for part in parts]), *parts)
    message = b"".join((_LABEL, b" ", label, b" %d " % len(parts), *parts))
    return hashlib.blake2b(message, key=key, digest_size=_TAG_BYTES).digest()


def _mac(key: bytes, label: bytes, parts: tuple[bytes, ...]) -> bytes:
    digest = hmac.new(key, digestmod=hashlib.sha256)
    for part in (_LABEL, label, *parts):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
