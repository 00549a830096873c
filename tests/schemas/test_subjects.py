from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.operations import Initiator
from schemas.protocol import PROTOCOL_VERSION, WrongProtocol, check_protocol
from schemas.subjects import IDENTIFIER, WORKER_ID, InvalidIdentifier, InvalidWorkerId, Subjects, may_be_answered


def test_subjects_are_as_documented() -> None:
    subjects = Subjects()
    assert subjects.graph("vlm", "generate").name == "nixlbus.v1.graph.vlm.generate"
    assert subjects.worker("decode-1", "claim").name == "nixlbus.v1.worker.decode-1.claim"
    assert subjects.ack("decode-1", "0123456789abcdef").name == "nixlbus.v1.ack.decode-1.0123456789abcdef"
    assert subjects.acks("decode-1").name == "nixlbus.v1.ack.decode-1.*"
    assert subjects.event("decode-1", "ready").name == "nixlbus.v1.event.decode-1.ready"
    assert Subjects().worker("decode.1f", "claim").name == "nixlbus.v1.worker.decode.1f.claim"
    assert Subjects().acks("decode.1f").name == "nixlbus.v1.ack.decode.1f.*"
    assert [str(subject) for subject in Subjects().events("drained")] == [
        "nixlbus.v1.event.*.drained",
        "nixlbus.v1.event.*.*.drained",
    ]
    assert Subjects("other").graph("vlm", "decode").name == "other.v1.graph.vlm.decode"


def test_templates_hold_no_ids_that_grow_in_number() -> None:
    assert Subjects().worker("decode-1", "claim").template == "worker.{worker_id}.claim"
    assert Subjects().graph("vlm", "decode").template == "graph.vlm.decode"


@pytest.mark.parametrize("bad", ["", "a.b", "*", ">", "a b", "a\n", "ä", "x" * 65, "$SRV"])
def test_an_identifier_can_not_widen_a_subject(bad: str) -> None:
    for make in (
        lambda: Subjects(bad),
        lambda: Subjects().graph(bad, "decode"),
        lambda: Subjects().worker("w", bad),
        lambda: Subjects().ack("w", bad),
    ):
        with pytest.raises(InvalidIdentifier):
            make()


@pytest.mark.parametrize("bad", ["", ".", "a.", ".a", "a..b", "a.b.c", "a.*", "a.>", "a. b", "a.b\n", "a." + "x" * 65])
def test_a_worker_id_has_one_dot_at_most_and_no_wildcard(bad: str) -> None:
    makes: list[Callable[[], object]] = [
        lambda: Subjects().worker(bad, "claim"),
        lambda: Subjects().ack(bad, "0123456789abcdef"),
        lambda: Subjects().acks(bad),
        lambda: Subjects().event(bad, "ready"),
    ]
    for make in makes:
        with pytest.raises(InvalidWorkerId, match=r"role\.instance"):
            make()
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"worker_id": bad, "epoch": ""}, Initiator)


@given(st.text(alphabet="ab.*>$ _-", max_size=8))
def test_a_worker_id_is_one_on_the_wire_if_it_is_one_in_a_subject(text: str) -> None:
    try:
        on_the_wire = msgspec.convert({"worker_id": text, "epoch": ""}, Initiator).worker_id
    except msgspec.ValidationError:
        on_the_wire = None
    assert (on_the_wire == text) == bool(WORKER_ID.fullmatch(text))


@pytest.mark.parametrize(
    ("reply", "answered"),
    [
        ("_INBOX.client.1.2", True),
        ("replies.of.mine", True),
        ("", False),
        ("nixlbus.v1.graph.vlm.decode", False),
        ("nixlbus", False),
        ("$JS.API.STREAM.DELETE.NIXLBUS_JOBS", False),
        ("$SRV.PING", False),
        ("nixlbusx.v1", True),
    ],
)
def test_a_reply_may_not_go_to_the_bus_s_own_subjects(reply: str, answered: bool) -> None:
    assert may_be_answered(reply, Subjects().graph("vlm", "generate")) is answered


@given(st.text(max_size=70))
def test_a_subject_has_the_tokens_that_it_was_made_of(text: str) -> None:
    if IDENTIFIER.fullmatch(text):
        assert Subjects().graph(text, "decode").name.split(".") == ["nixlbus", "v1", "graph", text, "decode"]
    else:
        with pytest.raises(InvalidIdentifier):
            Subjects().graph(text, "decode")


def test_our_protocol_and_the_one_before_are_accepted_and_no_other() -> None:
    for spoken in (PROTOCOL_VERSION, PROTOCOL_VERSION - 1):
        check_protocol(str(spoken), required=True)
    check_protocol(None, required=False)
    others = [str(PROTOCOL_VERSION + 1), str(PROTOCOL_VERSION - 2), "", "x" * 999, "2.0", "0x2", "²"]
    for theirs in (None, *others):
        with pytest.raises(WrongProtocol, match=f"understands {PROTOCOL_VERSION - 1} to {PROTOCOL_VERSION}"):
            check_protocol(theirs, required=True)
