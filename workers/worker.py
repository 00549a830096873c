"""`Worker`, the base of every role: a class with typed endpoints and a life.

In: an open `Bus`. Out: subjects served, a place in service discovery. A subclass declares its endpoints as methods

    @endpoint("encode", concurrency=4)
    async def encode(self, request: EncodeRequest) -> EncodeReply: ...

whose request type is read from the annotation; an async generator streams numbered frames. Workers of one role share
the stage's work as a queue group.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, TypeVar, get_type_hints

from bus import Bus, EndpointConfig
from schemas.message import Message
from workers.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
_DECLARED = "__nixlbus_endpoint__"


@dataclass(frozen=True, slots=True)
class _Declaration:
    stage: str
    concurrency: int
    max_queued: int
    public: bool
    direct: bool


def endpoint(
    stage: str, *, concurrency: int = 16, max_queued: int = 256, public: bool = False, direct: bool = False
) -> Callable[[F], F]:
    """Declare a method as the handler of a stage of the worker's graph.

    `concurrency` requests run at once and `max_queued` wait; one more is refused with `Overloaded`. `public` lets
    plain clients in (no protocol header, JSON). `direct` makes it a subject of this one instance.
    """

    def declare(method: F) -> F:
        setattr(method, _DECLARED, _Declaration(stage, concurrency, max_queued, public, direct))
        return method

    return declare


class Worker:
    """One role in one process. Subclasses set `role` and declare endpoints."""

    role: ClassVar[str] = "worker"
    needs_data_plane: ClassVar[bool] = True
    """Whether the role moves tensors."""

    def __init__(self, bus: Bus, settings: Settings) -> None:
        self.bus = bus
        self.settings = settings

    async def start(self) -> None:
        """Called before the endpoints open: load what they need."""

    async def stop(self) -> None:
        """Called after they have drained."""

    def metadata(self) -> dict[str, str]:
        """What service discovery tells of this worker."""
        return {"role": self.role, "graph": self.settings.graph}

    async def serve(self) -> None:
        """Open every declared endpoint, and those of `nixlbus perf` beside a data plane; appear in discovery."""
        for declaration, method in declared_endpoints(self):
            subjects = self.bus.subjects
            subject = (
                subjects.worker(self.bus.worker_id, declaration.stage)
                if declaration.direct
                else subjects.graph(self.settings.graph, declaration.stage)
            )
            config = EndpointConfig(
                name=declaration.stage,
                subject=subject,
                request_type=request_type(method),
                queue_group="" if declaration.direct else declaration.stage,
                concurrency=declaration.concurrency,
                max_queued=declaration.max_queued,
                default_ttl_s=self.settings.request_timeout_s,
                public=declaration.public,
            )
            await self.bus.serve(config, method)
        if self.needs_data_plane:
            from workers import performance  # it needs torch, which roles without tensors don't

            await performance.serve(self.bus)
        await self.bus.announce(f"nixlbus-{self.settings.graph}-{self.role}", package_version(), self.metadata())


def declared_endpoints(worker: Worker) -> list[tuple[_Declaration, Callable[..., Any]]]:
    """The worker's endpoint methods, bound, with their declarations."""
    methods = inspect.getmembers(worker, inspect.ismethod)
    return [(getattr(method, _DECLARED), method) for _, method in methods if hasattr(method, _DECLARED)]


def request_type(method: Callable[..., Any]) -> type[Message]:
    """The type of the method's one argument. Raises `TypeError` if that is no message."""
    parameters = list(inspect.signature(method).parameters)
    annotated = get_type_hints(method).get(parameters[0]) if len(parameters) == 1 else None
    if not (isinstance(annotated, type) and issubclass(annotated, Message)):
        raise TypeError(f"{method.__qualname__} must take one argument, annotated with a Message class")
    return annotated


def package_version() -> str:
    """The version of the installed package."""
    try:
        return version("nixlbus")
    except PackageNotFoundError:
        return "0.0.0"
