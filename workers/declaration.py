"""What a worker's class declares: endpoints that answer requests, handlers of events, queues of jobs.

In: typed async methods. Out: on the class, what a caller needs (`UnaryCall`, `StreamCall`, for `Bus.request` and
`Bus.stream`); on an instance, the bound method itself. What a decorator sees to be wrong is a `TypeError` when the
class is made; types come from the annotations and are checked when a worker begins to serve, before it subscribes.
"""

import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import UnionType
from typing import Any, ClassVar, Generic, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from bus import Frame, JobQueueConfig, Middleware, Place, RetryPolicy, StreamCall, UnaryCall
from schemas.message import Message

Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Message)
_STREAMS = (AsyncGenerator, AsyncIterator)


class Owner(Protocol):
    """What a class brings to its declarations."""

    group: str
    """What its subjects have in common."""
    timeout_s: float
    """For endpoints that don't say."""


@dataclass(frozen=True, slots=True)
class EndpointOptions:
    """How an endpoint is served; see `endpoint`."""

    stage: str = ""
    queue_group: str | None = None
    concurrency: int = 16
    max_queued: int = 256
    timeout_s: float | None = None
    retry: RetryPolicy = RetryPolicy()  # noqa: RUF009  # frozen
    public: bool = False
    direct: bool = False
    middleware: Sequence[Middleware] = ()


class Declared:
    """A declared method: its name, its function, its types."""

    may_yield: ClassVar[bool] = False
    """Whether the method may be an async generator."""

    def __init__(self, method: Callable[..., Any]) -> None:
        _check_method(method, may_yield=self.may_yield)
        self.method = method
        self.__doc__ = method.__doc__
        self.name = method.__name__

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @property
    def request_type(self) -> type[Message]:
        """The type of the method's one argument. Raises `TypeError` if that is no message."""
        return request_type(self.method)

    def bound(self, worker: Owner) -> Callable[[Any], Any]:
        """The method of `worker`."""
        bound: Callable[[Any], Any] = self.method.__get__(worker)
        return bound


class DeclaredEndpoint(Declared):
    """An endpoint of a class, with its options."""

    may_yield = True

    def __init__(self, method: Callable[..., Any], options: EndpointOptions) -> None:
        super().__init__(method)
        self.options = options

    @property
    def stage(self) -> str:
        """Its last token of the subject."""
        return self.options.stage or self.name

    @property
    def reply_type(self) -> Any:
        """What it answers with: a message class, or the union of a stream's frames. Raises `TypeError`."""
        return reply_type(self.method)

    def place(self, owner: type[Owner]) -> Place:
        """Where it listens, as far as the class knows."""
        return Place(owner.group, self.stage)

    def timeout_s(self, owner: type[Owner]) -> float:
        """The time that a caller grants who doesn't say."""
        return owner.timeout_s if self.options.timeout_s is None else self.options.timeout_s


class UnaryEndpoint(DeclaredEndpoint, Generic[Q, R]):
    """Answers with one reply."""

    @overload
    def __get__(self, worker: None, owner: type[Owner]) -> UnaryCall[Q, R]: ...

    @overload
    def __get__(self, worker: Owner, owner: type[Owner]) -> Callable[[Q], Coroutine[Any, Any, R]]: ...

    def __get__(self, worker: Owner | None, owner: type[Owner]) -> Any:
        if worker is not None:
            return self.bound(worker)
        retry = self.options.retry
        return UnaryCall(self.place(owner), self.request_type, self.reply_type, self.timeout_s(owner), retry)


class StreamEndpoint(DeclaredEndpoint, Generic[Q, R]):
    """Answers with a stream of frames."""

    @overload
    def __get__(self, worker: None, owner: type[Owner]) -> StreamCall[Q, R]: ...

    @overload
    def __get__(self, worker: Owner, owner: type[Owner]) -> Callable[[Q], AsyncGenerator[R, None]]: ...

    def __get__(self, worker: Owner | None, owner: type[Owner]) -> Any:
        if worker is not None:
            return self.bound(worker)
        retry = self.options.retry
        return StreamCall(self.place(owner), self.request_type, self.reply_type, self.timeout_s(owner), retry)


@dataclass(frozen=True, slots=True)
class _EndpointDecorator:
    options: EndpointOptions = field(default_factory=EndpointOptions)

    @overload
    def __call__(self, method: Callable[[Any, Q], AsyncGenerator[R, None]]) -> StreamEndpoint[Q, R]: ...

    @overload
    def __call__(self, method: Callable[[Any, Q], Coroutine[Any, Any, R]]) -> UnaryEndpoint[Q, R]: ...

    def __call__(self, method: Callable[..., Any]) -> Any:
        is_stream = inspect.isasyncgenfunction(method)
        return (StreamEndpoint if is_stream else UnaryEndpoint)(method, self.options)


def endpoint(
    stage: str = "",
    *,
    queue_group: str | None = None,
    concurrency: int = 16,
    max_queued: int = 256,
    timeout_s: float | None = None,
    retry: RetryPolicy = RetryPolicy(),  # noqa: B008  # frozen
    public: bool = False,
    direct: bool = False,
    middleware: Sequence[Middleware] = (),
) -> _EndpointDecorator:
    """Declare a method as an endpoint: a request in, a reply out, or frames where it is an async generator.

    `stage`: the last token of its subject, `graph.<group>.<stage>`; the method's name if empty. `queue_group`: whose
    members share the requests; the stage's name if None, "" for none, so that every instance gets every request.
    `concurrency` requests run at once and `max_queued` wait; one more is refused with `Overloaded`. `timeout_s` is what
    a request without a deadline may take, and a call of this endpoint by default; the worker's `timeout_s` if None.
    `retry`: how a call of it is repeated by default. `public` lets plain clients in (no protocol header, JSON).
    `direct` makes it a subject of this one instance, `worker.<worker id>.<stage>`. `middleware` goes around it, inside
    the worker's.

    Raises `TypeError` for a method that is not declared with `async def`.
    """
    _check_parentheses("endpoint", stage)
    return _EndpointDecorator(
        EndpointOptions(stage, queue_group, concurrency, max_queued, timeout_s, retry, public, direct, middleware)
    )


class EventHandler(Declared, Generic[Q]):
    """A method that is called with each event of a kind."""

    taken_by = "await bus.publish(bus.subjects.event(bus.worker_id, kind), event), or a worker's emit(kind, event)"
    """How an event comes to it; for whoever gives it to another of the bus's methods."""

    def __init__(self, method: Callable[..., Any], kind: str, queue_group: str, concurrency: int) -> None:
        super().__init__(method)
        self.kind = kind
        self.queue_group = queue_group
        self.concurrency = concurrency

    @overload
    def __get__(self, worker: None, owner: type) -> "EventHandler[Q]": ...

    @overload
    def __get__(self, worker: Owner, owner: type) -> Callable[[Q], Coroutine[Any, Any, None]]: ...

    def __get__(self, worker: Owner | None, owner: type) -> Any:
        return self if worker is None else self.bound(worker)

    def __str__(self) -> str:
        return f"{self.method.__qualname__}, a handler of {self.kind!r} events"


def on_event(
    kind: str, *, queue_group: str = "", concurrency: int = 1
) -> Callable[[Callable[[Any, Q], Coroutine[Any, Any, None]]], EventHandler[Q]]:
    """Declare a method as a handler of the events of a kind, whichever worker sends them (`Worker.emit`).

    Without a `queue_group` every instance gets each; with one, one of its members does. Events are not kept for whoever
    is away, and with a `concurrency` of 1 they come in their sender's order.

    Raises `TypeError` for a method that is not declared with `async def`.
    """
    _check_parentheses("on_event", kind)

    def declare(method: Callable[[Any, Q], Coroutine[Any, Any, None]]) -> EventHandler[Q]:
        return EventHandler(method, kind, queue_group, concurrency)

    return declare


class DeclaredJob(Declared, Generic[Q]):
    """A method that does the jobs of a queue. On the class it is the queue, for `Bus.submit`."""

    def __init__(self, method: Callable[..., Any], queue: str, settings: Mapping[str, Any]) -> None:
        super().__init__(method)
        self._queue = queue
        self._settings = settings

    def within(self, group: str) -> JobQueueConfig[Q]:
        """The queue, in a group. Raises `TypeError`, and `LocalProtocolError` for settings that can't be used."""
        queue: JobQueueConfig[Any] = JobQueueConfig(
            graph=group, queue=self._queue or self.name, message_type=self.request_type, **self._settings
        )
        return queue

    @overload
    def __get__(self, worker: None, owner: type[Owner]) -> JobQueueConfig[Q]: ...

    @overload
    def __get__(self, worker: Owner, owner: type[Owner]) -> Callable[[Q], Coroutine[Any, Any, None]]: ...

    def __get__(self, worker: Owner | None, owner: type[Owner]) -> Any:
        return self.within(owner.group) if worker is None else self.bound(worker)


def job(queue: str = "", **settings: Any) -> Callable[[Callable[[Any, Q], Coroutine[Any, Any, None]]], DeclaredJob[Q]]:
    """Declare a method as the one that does the jobs of a queue, `job.<group>.<queue>`; the method's name if empty.

    `settings` are those of `JobQueueConfig`: concurrency, ack_wait_s, max_duration_s, max_deliver, backoff_s and the
    others. A job is submitted with `await bus.submit(Media.transcode, Transcode(...), job_id="...")`, kept in JetStream
    until the method has returned, delivered again if it raises, and a dead letter in the end.

    Raises `TypeError` for a method that is not declared with `async def`.
    """
    _check_parentheses("job", queue)

    def declare(method: Callable[[Any, Q], Coroutine[Any, Any, None]]) -> DeclaredJob[Q]:
        return DeclaredJob(method, queue, settings)

    return declare


D = TypeVar("D", bound=Declared)


def declared(owner: type, kind: type[D]) -> Iterator[D]:
    """What a class and its bases declare, in the order of their names."""
    for name in dir(owner):
        found = inspect.getattr_static(owner, name)
        if isinstance(found, kind):
            yield found


def request_type(method: Callable[..., Any]) -> type[Message]:
    """The type of the method's one argument beside self. Raises `TypeError` if that is no message."""
    parameters = [name for name in inspect.signature(method).parameters if name != "self"]
    annotated = get_type_hints(method).get(parameters[0]) if len(parameters) == 1 else None
    if not _is_message(annotated):
        raise TypeError(f"{method.__qualname__} must take one argument, annotated with a Message class")
    assert annotated is not None
    found: type[Message] = annotated
    return found


def reply_type(method: Callable[..., Any]) -> Any:
    """What the method's annotation says it returns or yields. Raises `TypeError` if that is no message, or for a
    stream no `Frame`: the numbers of frames are what a lost one is noticed by."""
    annotated = get_type_hints(method).get("return")
    is_stream = inspect.isasyncgenfunction(method)
    if get_origin(annotated) in _STREAMS:
        is_stream = True
        annotated = get_args(annotated)[0]
    members = get_args(annotated) if get_origin(annotated) in (Union, UnionType) else (annotated,)
    if not all(_is_message(member) for member in members):
        raise TypeError(f"{method.__qualname__} must say which Message class it returns, or which it yields")
    plain = [member.__name__ for member in members if is_stream and not issubclass(member, Frame)]
    if plain:
        raise TypeError(f"{method.__qualname__} yields {', '.join(plain)}: what a stream yields must be a Frame class")
    return annotated


def _check_parentheses(decorator: str, argument: object) -> None:
    if not isinstance(argument, str):
        name = getattr(argument, "__qualname__", repr(argument))
        call = f'@{decorator}("kind")' if decorator == "on_event" else f"@{decorator}()"
        raise TypeError(f"{name}: {call} is written with parentheses, and its first argument is a str")


def _check_method(method: Callable[..., Any], *, may_yield: bool) -> None:
    name = getattr(method, "__qualname__", repr(method))
    if inspect.isasyncgenfunction(method):
        if not may_yield:
            raise TypeError(f"{name} yields, which only an @endpoint may")
    elif not inspect.iscoroutinefunction(method):
        raise TypeError(f"{name} is not declared with 'async def'; a decorator below must return such a function too")


def _is_message(annotated: Any) -> bool:
    return isinstance(annotated, type) and issubclass(annotated, Message)
