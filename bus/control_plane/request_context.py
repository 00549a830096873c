"""What is known of a request beside its message, and what may be put around every request of an endpoint.

In: the request that a task works on. Out: `current_request()`, for handlers; a `RequestContext`, for middleware.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from bus.deadline import Deadline
from bus.errors import LocalProtocolError
from schemas.message import Message
from schemas.protocol import REQUEST_ID_HEADER


@dataclass(slots=True)
class RequestContext:
    """What a middleware, or a handler by `current_request()`, may know of the request beside its message."""

    endpoint: str
    subject: str
    """As it was published to."""
    headers: dict[str, str]
    deadline: Deadline
    worker_id: str
    """Who works on it."""
    message: Message
    """What the handler is given; a middleware may put another of the same type."""

    @property
    def request_id(self) -> str:
        """The caller's id for it; "" from a plain client."""
        return self.headers.get(REQUEST_ID_HEADER, "")


Middleware = Callable[[RequestContext], AbstractAsyncContextManager[None]]
"""Around every request of an endpoint, the outermost first: an `@asynccontextmanager` of the context. It may refuse by
raising, sees the handler's exceptions, and may put another `message`."""


class HasContext(Protocol):
    """What a task works on; its context is made when it is asked for."""

    @property
    def context(self) -> RequestContext | None: ...  # noqa: D102


working_on: ContextVar[HasContext | None] = ContextVar("nixlbus_working_on", default=None)


def current_request() -> RequestContext:
    """The request, or the event, that the current task works on. Raises `LocalProtocolError` outside of a handler."""
    work = working_on.get()
    context = work.context if work is not None else None
    if context is None:
        raise LocalProtocolError(
            "no request is being worked on here",
            remedy="call it in an endpoint's or an event's handler; in a job's, current_job()",
        )
    return context
