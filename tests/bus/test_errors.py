import pytest

import bus
from bus.errors import BusError, RemoteFault, RequestRefused, fault_of
from bus.handshake.authentication import KeyRing
from schemas.codec import InvalidMessage
from schemas.fault import HTTP_STATUS, Fault, FaultCode


def test_an_unexpected_error_tells_nothing_of_the_process() -> None:
    fault = fault_of(ValueError("secret at 0x7f"), worker_id="w")
    assert fault.code == FaultCode.INTERNAL
    assert "secret" not in str(fault)
    assert "ValueError" not in str(fault)


def test_a_fault_travels_on_unchanged_but_for_its_hops() -> None:
    first = fault_of(bus.PoolExhausted("full", num_bytes=3), worker_id="decode-1", trace_id="t")
    second = fault_of(RemoteFault(first), worker_id="processor-1", trace_id="t")
    third = fault_of(RemoteFault(second), worker_id="frontend-1", trace_id="t")
    assert (third.code, third.message, third.remedy, third.worker_id) == (
        first.code,
        first.message,
        first.remedy,
        "decode-1",
    )
    assert third.hops == ["processor-1", "frontend-1"]
    assert third.retryable


def test_a_refusal_carries_its_own_code() -> None:
    assert fault_of(RequestRefused(FaultCode.INVALID_IMAGE, "no"), worker_id="w").code == FaultCode.INVALID_IMAGE


def test_every_exported_error_is_in_the_tree_with_a_code_and_a_remedy_in_its_text() -> None:
    errors = [value for value in vars(bus).values() if isinstance(value, type) and issubclass(value, BusError)]
    assert len(errors) > 15
    for error_type in errors:
        if error_type in (RemoteFault, RequestRefused):
            continue
        error = error_type("it broke", remedy="mend it", peer="w", operation_id="0" * 16)
        assert str(error) == "it broke (peer w, operation 0000000000000000); mend it"
        assert isinstance(error.code, FaultCode)


def test_codes_have_http_statuses_and_an_unknown_code_is_500() -> None:
    assert Fault(code=FaultCode.OVERLOADED, message="").http_status == 503
    assert Fault(code="from the future", message="").http_status == 500
    assert set(HTTP_STATUS.values()) <= {400, 403, 404, 413, 503, 504}


def test_remedies_name_what_can_be_run() -> None:
    assert "nixlbus ps --endpoints" in fault_of(InvalidMessage("Expected `int`, got `str`"), worker_id="w").remedy
    assert "nixlbus ps" in bus.PeerLost("gone").remedy
    with pytest.raises(bus.KeyFileError, match=r"nixlbus server.*nixlbus nats-conf"):
        KeyRing.load("")
