"""What a caller needs to know of a declared endpoint: where it is, what it takes and gives, how long and how often.

In: a worker's class, which makes these from its methods. Out: a typed argument for `Bus.request` and `Bus.stream`.
"""

from dataclasses import dataclass, replace
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from bus.control_plane.retry import THRICE, RetryPolicy
from schemas.message import Message
from schemas.subjects import Subject, Subjects

Q = TypeVar("Q", bound=Message, contravariant=True)
R = TypeVar("R", covariant=True)


@dataclass(frozen=True, slots=True)
class Place:
    """Where an endpoint listens: a stage of a group, or with `worker_id` one worker's own."""

    group: str
    stage: str
    worker_id: str = ""

    def subject(self, subjects: Subjects) -> Subject:
        """Its subject on a bus. Raises `InvalidIdentifier`."""
        if self.worker_id:
            return subjects.worker(self.worker_id, self.stage)
        return subjects.graph(self.group, self.stage)

    def __str__(self) -> str:
        return f"{self.worker_id or self.group}.{self.stage}"


@dataclass(frozen=True, slots=True)
class UnaryCall(Generic[Q, R]):
    """An endpoint that answers a request with one reply."""

    taken_by: ClassVar[str] = "await bus.request(...)"
    place: Place
    request_type: type[Message]
    reply_type: Any
    timeout_s: float = 60.0
    retry: RetryPolicy = THRICE

    if not TYPE_CHECKING:  # mypy refuses the call by itself

        def __call__(self, *_: object, **__: object) -> None:
            """Raises `TypeError`."""
            raise TypeError(not_called(self))

    def __str__(self) -> str:
        return f"the endpoint {self.place}, which returns one reply"

    def at(self, worker_id: str) -> "UnaryCall[Q, R]":
        """The same of one worker, for an endpoint that is declared `direct`."""
        return replace(self, place=replace(self.place, worker_id=worker_id))

    def within(self, group: str) -> "UnaryCall[Q, R]":
        """The same in another group."""
        return replace(self, place=replace(self.place, group=group))


@dataclass(frozen=True, slots=True)
class StreamCall(Generic[Q, R]):
    """An endpoint that answers a request with a stream of frames."""

    taken_by: ClassVar[str] = "async for frame in bus.stream(...)"
    place: Place
    request_type: type[Message]
    frame_type: type[Message] | UnionType
    timeout_s: float = 60.0
    retry: RetryPolicy = THRICE

    if not TYPE_CHECKING:

        def __call__(self, *_: object, **__: object) -> None:
            """Raises `TypeError`."""
            raise TypeError(not_called(self))

    def __str__(self) -> str:
        return f"the endpoint {self.place}, which answers with a stream"

    def at(self, worker_id: str) -> "StreamCall[Q, R]":
        """The same of one worker, for an endpoint that is declared `direct`."""
        return replace(self, place=replace(self.place, worker_id=worker_id))

    def within(self, group: str) -> "StreamCall[Q, R]":
        """The same in another group."""
        return replace(self, place=replace(self.place, group=group))


def not_called(call: UnaryCall[Any, Any] | StreamCall[Any, Any]) -> str:
    """What to tell somebody who calls a class's endpoint as if it were a function."""
    return f"{call} is no function of its class: on an instance it is, and to call a worker write {call.taken_by}"
