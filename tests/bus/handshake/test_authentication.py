import os
from pathlib import Path

import msgspec
import pytest

from bus.errors import AuthenticationError
from bus.handshake import statements
from bus.handshake.authentication import KeyFileError, KeyRing, write_key_file
from schemas.handshake import AgentDescription, AgentMetadataRequest
from schemas.operations import (
    Initiator,
    MemoryExtent,
    OperationKind,
    ProcessIdentity,
    RdmaMetadata,
    Run,
    TensorLayout,
)

ASKING = Initiator(worker_id="prefill-1", epoch="e1")
PROCESS = ProcessIdentity(boot_id="b", pid_namespace="n", pid=1, start_ticks=2)
DESCRIPTION = AgentDescription(
    worker_id="decode-1", epoch="e9", agent_name="decode-1-e9", agent_metadata=b"metadata", regions=[]
)
OLD, NEW = ("old", b"o" * 32), ("new", b"n" * 32)
replaced = msgspec.structs.replace


def ask(keys: KeyRing, peer: str = "decode-1") -> AgentMetadataRequest:
    return statements.question(keys, ASKING, PROCESS, peer, [])


def test_an_answer_holds_for_its_question_and_bytes_alone() -> None:
    ring = KeyRing((OLD,))
    request = ask(ring)
    reply = statements.answer(ring, request, DESCRIPTION)
    assert statements.proved_description(ring, request, reply, "decode-1") == DESCRIPTION
    for forged in (
        replaced(reply, description=reply.description + b"x"),
        replaced(reply, mac=bytes(32)),
        replaced(reply, key_id="other"),
    ):
        with pytest.raises(AuthenticationError):
            statements.proved_description(ring, request, forged, "decode-1")
    for other in (ask(ring), replaced(request, requester="prefill-2")):
        with pytest.raises(AuthenticationError):
            statements.proved_description(ring, other, reply, "decode-1")


def test_a_question_holds_for_its_asker_its_process_and_the_asked_alone() -> None:
    ring = KeyRing((OLD,))
    request = ask(ring)
    statements.check_question(ring, request, "decode-1")
    with pytest.raises(AuthenticationError):
        statements.check_question(ring, request, "decode-2")
    for forged in (
        replaced(request, requester="prefill-2"),
        replaced(request, requester_epoch="e2"),
        replaced(request, process=replaced(PROCESS, pid=9)),
        replaced(request, regions=[1]),
        replaced(request, nonce=b"1" * 16),
        AgentMetadataRequest(nonce=bytes(16), requester="prefill-1"),  # as the version before asked
    ):
        with pytest.raises(AuthenticationError):
            statements.check_question(ring, forged, "decode-1")


def test_a_last_word_and_a_report_hold_for_those_they_name_alone() -> None:
    ring, stranger = KeyRing((OLD,)), KeyRing((NEW,))
    last_word = statements.epoch_drained(ring, ASKING)
    assert statements.check_epoch_drained(ring, last_word) == ASKING
    report = statements.process_reaped(ring, "prefill-1", PROCESS)
    statements.check_process_reaped(ring, report)
    for forged_word in (replaced(last_word, epoch="e2"), statements.epoch_drained(stranger, ASKING)):
        with pytest.raises(AuthenticationError):
            statements.check_epoch_drained(ring, forged_word)
    for forged_report in (
        replaced(report, worker_id="prefill-2"),
        replaced(report, process=replaced(PROCESS, start_ticks=3)),
        replaced(report, mac=last_word.mac),
    ):
        with pytest.raises(AuthenticationError):
            statements.check_process_reaped(ring, forged_report)


GRANT = RdmaMetadata(
    operation_id="f" * 16,
    kind=OperationKind.WRITABLE,
    worker_id="decode-1",
    epoch="e9",
    memory=[MemoryExtent(region=0, generation=1, runs=[Run(offset_bytes=0, length_bytes=64)])],
    lease_ms=1000,
    initiator=ASKING,
    serial=7,
    layout=TensorLayout(dtype="float32", shape=[4, 4]),
)
OTHERWISE = {
    "operation_id": "e" * 16,
    "kind": OperationKind.READABLE,
    "worker_id": "decode-2",
    "epoch": "e8",
    "memory": [MemoryExtent(region=0, generation=1, runs=[Run(offset_bytes=64, length_bytes=64)])],
    "lease_ms": 100_000,
    "initiator": Initiator(worker_id="prefill-2", epoch="e1"),
    "token": bytes(16),
    "serial": 8,
    "layout": None,
    "max_claims": 2,
    "checksummed": True,
    "checksum": b"c" * 16,
}


@pytest.mark.parametrize("field", RdmaMetadata.__struct_fields__)
def test_a_named_grant_s_token_proves_every_field(field: str) -> None:
    ring = KeyRing((OLD,))
    grant = replaced(GRANT, token=statements.grant_token(ring, GRANT))
    statements.check_grant(KeyRing((NEW, OLD)), grant)
    with pytest.raises(AuthenticationError):
        statements.check_grant(ring, replaced(grant, **{field: OTHERWISE[field]}))
    with pytest.raises(AuthenticationError):
        statements.check_grant(KeyRing((NEW,)), grant)


def test_two_keys_serve_while_they_rotate() -> None:
    before, during, after = KeyRing((OLD,)), KeyRing((NEW, OLD)), KeyRing((NEW,))
    statements.check_question(during, ask(before), "decode-1")
    statements.check_question(after, ask(during), "decode-1")
    with pytest.raises(AuthenticationError):
        statements.check_question(after, ask(before), "decode-1")


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
