"""`Fault`, the reply that says why there is no answer: typed, with a remedy, and never an exception's repr.

Where a service sits between the failure and the caller, the fault travels on unchanged but for `hops`, so that the
client sees where it happened and every worker that it passed.
"""

from enum import StrEnum
from types import MappingProxyType

import msgspec

from schemas.message import Message


class FaultCode(StrEnum):
    """What went wrong, for programs. A newer peer may send a code that is not listed here."""

    MALFORMED_MESSAGE = "malformed_message"
    UNKNOWN_MESSAGE_TYPE = "unknown_message_type"
    INVALID_MESSAGE = "invalid_message"
    WRONG_PROTOCOL = "wrong_protocol"
    UNKNOWN_MODEL = "unknown_model"
    INVALID_PROMPT = "invalid_prompt"
    INVALID_IMAGE = "invalid_image"
    IMAGE_TOO_LARGE = "image_too_large"
    PROMPT_TOO_LONG = "prompt_too_long"
    UNSUPPORTED = "unsupported"
    NOT_FOUND = "not_found"
    NO_RESPONDERS = "no_responders"
    OVERLOADED = "overloaded"
    DRAINING = "draining"
    DECLINED = "declined"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CONNECTION_LOST = "connection_lost"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    PERMISSION_DENIED = "permission_denied"
    STALE_GRANT = "stale_grant"
    PROTOCOL_VIOLATION = "protocol_violation"
    POOL_EXHAUSTED = "pool_exhausted"
    TRANSFER_FAILED = "transfer_failed"
    PEER_LOST = "peer_lost"
    DURABLE_WORK_UNAVAILABLE = "durable_work_unavailable"
    DELIVERIES_EXHAUSTED = "deliveries_exhausted"
    CANCELLED = "cancelled"
    INTERNAL = "internal"


HTTP_STATUS = MappingProxyType(
    {
        FaultCode.MALFORMED_MESSAGE: 400,
        FaultCode.UNKNOWN_MESSAGE_TYPE: 400,
        FaultCode.INVALID_MESSAGE: 400,
        FaultCode.WRONG_PROTOCOL: 400,
        FaultCode.UNKNOWN_MODEL: 404,
        FaultCode.INVALID_PROMPT: 400,
        FaultCode.INVALID_IMAGE: 400,
        FaultCode.IMAGE_TOO_LARGE: 413,
        FaultCode.PROMPT_TOO_LONG: 400,
        FaultCode.UNSUPPORTED: 400,
        FaultCode.NOT_FOUND: 404,
        FaultCode.NO_RESPONDERS: 503,
        FaultCode.OVERLOADED: 503,
        FaultCode.DRAINING: 503,
        FaultCode.DECLINED: 503,
        FaultCode.CANCELLED: 503,
        FaultCode.DEADLINE_EXCEEDED: 504,
        FaultCode.CONNECTION_LOST: 503,
        FaultCode.PAYLOAD_TOO_LARGE: 413,
        FaultCode.PERMISSION_DENIED: 403,
        FaultCode.POOL_EXHAUSTED: 503,
        FaultCode.PEER_LOST: 503,
        FaultCode.DURABLE_WORK_UNAVAILABLE: 503,
    }
)
"""Fault code to HTTP status, which is also the number in `Nats-Service-Error-Code`. Others are 500."""

RETRYABLE = frozenset(
    {
        FaultCode.NO_RESPONDERS,
        FaultCode.OVERLOADED,
        FaultCode.DRAINING,
        FaultCode.DECLINED,
        FaultCode.CANCELLED,
        FaultCode.CONNECTION_LOST,
        FaultCode.POOL_EXHAUSTED,
        FaultCode.PEER_LOST,
    }
)
"""Codes after which the same request may succeed elsewhere or later."""


class Fault(Message, frozen=True, kw_only=True, tag="fault"):
    """Why a request has no answer."""

    code: str
    message: str
    remedy: str = ""
    retryable: bool = False
    begun: bool = False
    """Whether the request's handler had begun, and didn't say that it refuses: something may have been done."""
    retry_after_ms: int = 0
    """Of a refusal for load: when a place is likely to be free."""
    worker_id: str = ""
    """Where it happened."""
    hops: list[str] = msgspec.field(default_factory=list)
    """The workers that the fault passed on its way to the caller, nearest to the failure first."""
    trace_id: str = ""
    seq: int = 0
    """In a stream of frames: the number of frames before it."""

    @property
    def http_status(self) -> int:
        """The HTTP status that stands for this fault; 500 for a code that this version doesn't know."""
        try:
            return HTTP_STATUS.get(FaultCode(self.code), 500)
        except ValueError:
            return 500
