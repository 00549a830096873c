import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.protocol import PROTOCOL_VERSION, WrongProtocol, check_protocol
from schemas.subjects import IDENTIFIER, InvalidIdentifier, Subjects


def test_subjects_are_as_documented() -> None:
    subjects = Subjects()
    assert subjects.graph("vlm", "generate").name == "nixlbus.v1.graph.vlm.generate"
    assert subjects.worker("decode-1", "claim").name == "nixlbus.v1.worker.decode-1.claim"
    assert subjects.ack("decode-1", "0123456789abcdef").name == "nixlbus.v1.ack.decode-1.0123456789abcdef"
    assert subjects.acks("decode-1").name == "nixlbus.v1.ack.decode-1.*"
    assert subjects.event("decode-1", "ready").name == "nixlbus.v1.event.decode-1.ready"
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


@given(st.text(max_size=70))
def test_a_subject_has_the_tokens_that_it_was_made_of(text: str) -> None:
    if IDENTIFIER.fullmatch(text):
        assert Subjects().worker(text, "claim").name.split(".") == ["nixlbus", "v1", "worker", text, "claim"]
    else:
        with pytest.raises(InvalidIdentifier):
            Subjects().worker(text, "claim")


def test_our_protocol_and_the_one_before_are_accepted_and_no_other() -> None:
    for spoken in (PROTOCOL_VERSION, PROTOCOL_VERSION - 1):
        check_protocol(str(spoken), required=True)
    check_protocol(None, required=False)
    others = [str(PROTOCOL_VERSION + 1), str(PROTOCOL_VERSION - 2), "", "x" * 999, "2.0", "0x2", "²"]
    for theirs in (None, *others):
        with pytest.raises(WrongProtocol, match=f"understands {PROTOCOL_VERSION - 1} to {PROTOCOL_VERSION}"):
            check_protocol(theirs, required=True)
