"""What becomes of a delivery, without any I/O."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import (
    ConnectionLost,
    DeadlineExceeded,
    JobExpired,
    LocalProtocolError,
    Overloaded,
    RemoteFault,
    RequestRefused,
)
from bus.control_plane.delivery import Delivery, delivery_of, nak
from bus.jobs.verdict import Bury, Retry, Standing, after_failure, attempts, pause_s, standing
from schemas.codec import MalformedMessage
from schemas.fault import Fault, FaultCode
from schemas.jobs import JobClaim
from tests.bus.jobs.queues import queue

CLAIM = JobClaim(state="working", job_id="j", worker_id="a", epoch="e", delivery=2, stream_sequence=7)


def delivery(num_delivered: int, stream_sequence: int = 7) -> Delivery:
    return Delivery("s", b"", {}, "$JS.ACK", stream_sequence, num_delivered, 0)


def test_a_claim_means_what_it_says_to_each_delivery() -> None:
    done = msgspec.structs.replace(CLAIM, state="done")
    assert standing(None, delivery(1)) is Standing.FREE
    assert standing(CLAIM, delivery(3)) is Standing.OURS
    assert standing(CLAIM, delivery(2)) is Standing.SUPERSEDED
    assert standing(CLAIM, delivery(1)) is Standing.SUPERSEDED
    assert standing(CLAIM, delivery(1, 8)) is Standing.OTHER
    assert standing(done, delivery(3)) is standing(done, delivery(1, 8)) is Standing.DONE


def test_only_deliveries_that_a_worker_began_with_count() -> None:
    assert attempts(delivery(5), None) == 5
    assert attempts(delivery(5), msgspec.structs.replace(CLAIM, attempt=2)) == 2


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (ValueError("x"), True),
        (ConnectionLost("x"), True),
        (Overloaded("x"), True),
        (DeadlineExceeded("x"), True),
        (TimeoutError(), True),
        (RemoteFault(Fault(code="internal", message="x")), True),
        (RemoteFault(Fault(code="a_code_of_tomorrow", message="x")), True),
        (RemoteFault(Fault(code="not_found", message="x")), False),
        (RequestRefused(FaultCode.OVERLOADED, "x"), True),
        (RequestRefused(FaultCode.INVALID_IMAGE, "x"), False),
        (LocalProtocolError("x"), False),
        (MalformedMessage("x"), False),
        (JobExpired("x"), False),
    ],
)
def test_a_failure_is_tried_again_unless_it_would_come_again(error: Exception, again: bool) -> None:
    config = queue(max_deliver=3)
    verdict = after_failure(config, error, 1, "w")
    assert isinstance(verdict, Retry if again else Bury)
    assert isinstance(after_failure(config, error, 3, "w"), Bury)


def test_what_an_unexpected_error_says_stays_in_the_log() -> None:
    verdict = after_failure(queue(max_deliver=1), ValueError("password=hunter2"), 1, "w")
    assert isinstance(verdict, Bury)
    assert "hunter2" not in str(verdict.fault)
    assert "ValueError" in verdict.fault.message


def test_pauses_grow_to_the_last_and_differ_by_a_fifth() -> None:
    config = queue(backoff_s=(1.0, 10.0))
    for number, planned_s in ((1, 1.0), (2, 10.0), (3, 10.0), (99, 10.0)):
        pauses = [pause_s(config, number) for _ in range(200)]
        assert planned_s * 0.8 <= min(pauses) < max(pauses) <= planned_s * 1.2


def test_a_nak_always_has_a_delay() -> None:
    assert nak(1.5) == b'-NAK {"delay": 1500000000}'


class _Message:
    subject, data, headers = "s", b"x", None

    def __init__(self, reply: str) -> None:
        self.reply = reply


@pytest.mark.parametrize(
    "reply",
    ["$JS.ACK.S.C.2.7.9.1700000000000000000.3", "$JS.ACK.hub.ACC.S.C.2.7.9.1700000000000000000.3.token"],
)
def test_both_forms_of_an_ack_subject_are_read(reply: str) -> None:
    read = delivery_of(_Message(reply))  # type: ignore[arg-type]
    assert read is not None
    assert (read.num_delivered, read.stream_sequence, read.stored_at_ns) == (2, 7, 1700000000000000000)


@given(st.text(alphabet="$JSACK.019x", max_size=60))
def test_no_reply_subject_breaks_the_reading(reply: str) -> None:
    delivery_of(_Message(reply))  # type: ignore[arg-type]
