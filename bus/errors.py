"""The errors of the bus: one tree, with fields, a remedy in the text, and a fault code for the wire.

In: what NATS, NIXL, a peer or a caller did. Out: an exception that says what happened to whom and what to do.
Each lane maps its library's errors once, at its boundary; between processes an error travels as a `Fault` and
arrives as `RemoteFault`. `LocalProtocolError` is the caller's mistake, `RemoteProtocolError` the peer's (the
distinction is h11's).
"""

from typing import Any, ClassVar

from schemas.codec import MessageError
from schemas.fault import RETRYABLE, Fault, FaultCode
from schemas.protocol import WrongProtocol
from schemas.subjects import InvalidIdentifier


class BusError(Exception):
    """Base of everything that the bus raises.

    Attributes: `what` happened, `remedy` (what to do), and where they apply `peer` (a worker id), `operation_id`,
    `num_bytes`, `subject`.
    """

    code: ClassVar[FaultCode] = FaultCode.INTERNAL
    default_remedy: ClassVar[str] = ""

    def __init__(
        self,
        what: str,
        *,
        remedy: str = "",
        peer: str = "",
        operation_id: str = "",
        num_bytes: int | None = None,
        subject: str = "",
    ) -> None:
        self.what = what
        self.remedy = remedy or self.default_remedy
        self.peer = peer
        self.operation_id = operation_id
        self.num_bytes = num_bytes
        self.subject = subject
        super().__init__(what)

    def __str__(self) -> str:
        context = [
            f"{name} {value}"
            for name, value in (
                ("peer", self.peer),
                ("operation", self.operation_id),
                ("subject", self.subject),
            )
            if value
        ]
        where = f" ({', '.join(context)})" if context else ""
        return f"{self.what}{where}" + (f"; {self.remedy}" if self.remedy else "")


class LocalProtocolError(BusError):
    """The caller asked for something that the protocol doesn't allow; nothing was sent or posted."""

    code = FaultCode.UNSUPPORTED


class WrongPairing(LocalProtocolError):
    """A read of a writable grant, or a write of a readable one."""

    default_remedy = "begin_read takes the metadata of create_readable, begin_write that of create_writable"


class WrongLength(LocalProtocolError):
    """The two sides of an operation don't hold the same number of bytes."""


class WrongLayout(LocalProtocolError):
    """The two sides of an operation say different dtypes or shapes."""

    default_remedy = "give both sides the same dtype and shape, or view one of them as bytes (torch.uint8, 1-D)"


class InvalidDescriptor(LocalProtocolError):
    """Something that can't be described as memory."""


class NotContiguous(InvalidDescriptor):
    """Memory with gaps or in another order; it is never copied silently."""


class ReadOnlyMemory(LocalProtocolError):
    """Memory that may not be written, as the target of a transfer."""

    default_remedy = "pass a bytearray or a writable array"


class RemoteProtocolError(BusError):
    """A peer sent what the protocol doesn't allow."""

    code = FaultCode.PROTOCOL_VIOLATION


class IncompatiblePeer(BusError):
    """A peer that can't be worked with: another protocol version, another model, another layout."""

    code = FaultCode.WRONG_PROTOCOL


class RemoteFault(BusError):
    """A peer answered with a fault. Attributes: `fault`, as it came, and `code`, the fault's."""

    def __init__(self, fault: Fault, *, subject: str = "") -> None:
        self.fault = fault
        self.code = fault.code  # type: ignore[misc,assignment]  # of the fault, which may be one of the future
        super().__init__(fault.message, remedy=fault.remedy, peer=fault.worker_id, subject=subject)


class RequestRefused(BusError):
    """A handler's own refusal, with the fault code that tells the caller why: bad input, an unknown model."""

    def __init__(self, code: FaultCode, what: str, *, remedy: str = "") -> None:
        self.refusal_code = code
        super().__init__(what, remedy=remedy)


class DeadlineExceeded(BusError):
    """Time ran out before an answer, an ack or a completion."""

    code = FaultCode.DEADLINE_EXCEEDED
    default_remedy = "retry with a longer deadline, or look at the trace for the slow hop"


class ControlPlaneError(BusError):
    """Something about NATS."""


class NoResponders(ControlPlaneError):
    """Nobody listens on the subject; known at once, not after a timeout."""

    code = FaultCode.NO_RESPONDERS
    default_remedy = "start a worker for it, and see the live ones with 'nixlbus ps'"


class PayloadTooLarge(ControlPlaneError):
    """The message is over the server's max_payload; nothing was sent."""

    code = FaultCode.PAYLOAD_TOO_LARGE
    default_remedy = (
        "send a URL, put it into the object store (bus.media.put) and send its reference, send tensors over the data "
        "plane, or raise max_payload in the NATS server's configuration"
    )


class ConnectionLost(ControlPlaneError):
    """The connection to NATS went away while something was under way, or could not be made."""

    code = FaultCode.CONNECTION_LOST
    default_remedy = "check that nats-server runs at NIXLBUS_NATS_URL, then retry"


class Overloaded(ControlPlaneError):
    """The endpoint's queue is full; the request was not taken. `retry_after_ms`: when a place is likely to be free."""

    code = FaultCode.OVERLOADED
    default_remedy = "retry later or start more workers of this role"

    def __init__(self, what: str, *, retry_after_ms: int = 0, **context: Any) -> None:
        self.retry_after_ms = retry_after_ms
        super().__init__(what, **context)


class Declined(ControlPlaneError):
    """The worker refused this request before, and its caller asked for another; the request was not taken."""

    code = FaultCode.DECLINED
    default_remedy = "send it again: another worker may get it"


class Cancelled(ControlPlaneError):
    """The work on the request was cancelled, and not by its caller."""

    code = FaultCode.CANCELLED


class Draining(ControlPlaneError):
    """The worker is shutting down; the request was not taken."""

    code = FaultCode.DRAINING
    default_remedy = "retry: another worker of the role will take it"


class PermissionDenied(ControlPlaneError):
    """The NATS server refused the subject to these credentials."""

    code = FaultCode.PERMISSION_DENIED
    default_remedy = "grant the subject to this user in the NATS server's configuration"


class DurableWorkUnavailable(ControlPlaneError):
    """JetStream can't take or give durable work now: it is off, out of space, or set up in another way."""

    code = FaultCode.DURABLE_WORK_UNAVAILABLE
    default_remedy = "see the NATS server's JetStream: 'nats account info', 'nats stream ls'"


class JobTakenOver(ControlPlaneError):
    """A later delivery of this job has its claim: what this one still does is done twice."""

    code = FaultCode.CANCELLED
    default_remedy = "stop without further effects; the other worker finishes the job"


class DeadLetterNotFound(ControlPlaneError):
    """No dead letter has this number: it was replayed or dropped, or it is older than the stream keeps."""

    code = FaultCode.NOT_FOUND
    default_remedy = "list them with 'nixlbus dlq ls'"


class MediaNotFound(ControlPlaneError):
    """The object store has nothing under a reference."""

    code = FaultCode.NOT_FOUND
    default_remedy = "put it again: objects are kept for NIXLBUS_MEDIA_TTL_S"


class MediaMismatch(ControlPlaneError):
    """What the object store has is not what the reference says; the bytes are not to be used."""

    code = FaultCode.PROTOCOL_VIOLATION
    default_remedy = "put it again under a name of its own"


class DataPlaneError(BusError):
    """Something about NIXL or registered memory."""

    code = FaultCode.TRANSFER_FAILED


class RegistrationError(DataPlaneError):
    """An agent, a backend or memory could not be set up with NIXL."""


class TransferError(DataPlaneError):
    """A transfer ended in an error; the target's bytes are not to be used."""


class PeerLost(DataPlaneError):
    """The peer's process or connection is gone."""

    code = FaultCode.PEER_LOST
    default_remedy = "ask again if doing it twice does no harm; 'nixlbus ps' shows who is live"


class StaleGrant(DataPlaneError):
    """A grant that is unknown, revoked, expired, already claimed, or of another epoch."""

    code = FaultCode.STALE_GRANT
    default_remedy = "ask the target for a new grant"


class ForeignGrant(StaleGrant):
    """A grant that names another initiator, or this worker in another epoch."""


class LeaseExpired(StaleGrant):
    """A grant whose lease is over, or so near its end that nothing may be posted any more."""


class ChecksumMismatch(TransferError):
    """The bytes that arrived are not those that were sent; they are not to be used."""


class IncompleteOperation(DataPlaneError):
    """Some of the peers of a one-to-many operation did not complete it. `outcomes` of the operation tells which."""


class PoolExhausted(DataPlaneError):
    """No registered memory left for the request."""

    code = FaultCode.POOL_EXHAUSTED
    default_remedy = "retry later, or give the worker more memory (NIXLBUS_ARENA_MB, NIXLBUS_KV_BLOCKS)"


class AuthenticationError(RemoteProtocolError):
    """A peer's description carries no valid proof; NIXL never saw it."""

    code = FaultCode.PERMISSION_DENIED
    default_remedy = "give both workers the same key (NIXLBUS_KEY_FILE)"


def fault_of(error: BaseException, *, worker_id: str, trace_id: str = "") -> Fault:
    """The fault that tells a caller about `error`: no repr, nothing of the process's inside for unexpected ones."""
    if isinstance(error, RemoteFault):
        return _forwarded(error.fault, worker_id, trace_id)
    code, message, remedy = _described(error)
    return Fault(
        code=code,
        message=message,
        remedy=remedy,
        retryable=code in RETRYABLE,
        retry_after_ms=error.retry_after_ms if isinstance(error, Overloaded) else 0,
        worker_id=worker_id,
        trace_id=trace_id,
    )


def _forwarded(fault: Fault, worker_id: str, trace_id: str) -> Fault:
    return Fault(
        code=fault.code,
        message=fault.message,
        remedy=fault.remedy,
        retryable=fault.retryable,
        retry_after_ms=fault.retry_after_ms,
        worker_id=fault.worker_id,
        hops=[*fault.hops, worker_id],
        trace_id=trace_id or fault.trace_id,
    )


def _described(error: BaseException) -> tuple[FaultCode, str, str]:
    if isinstance(error, BusError):
        text = str(error)
        code = error.refusal_code if isinstance(error, RequestRefused) else error.code
        return code, text.removesuffix(f"; {error.remedy}") if error.remedy else text, error.remedy
    if isinstance(error, WrongProtocol):
        return (
            FaultCode.WRONG_PROTOCOL,
            str(error),
            "use a caller of the same protocol version or the one before, or upgrade this worker",
        )
    if isinstance(error, MessageError):
        return (
            FaultCode(error.code),
            str(error),
            "compare it with what the endpoint takes: nixlbus ps --endpoints; its class has the fields",
        )
    if isinstance(error, InvalidIdentifier):
        return FaultCode.INVALID_MESSAGE, str(error), ""
    return FaultCode.INTERNAL, "the worker failed unexpectedly", "see the worker's log, by the trace id"
