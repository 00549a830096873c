"""`Worker`: a class with typed endpoints, and a life.

In: an open `Bus`, and whatever else the class's constructor takes. Out: subjects served, a place in service discovery.
A subclass declares what it does as methods:

    class Calculator(Worker):
        group = "math"

        @endpoint()
        async def add(self, request: Add) -> Sum: ...

and others call it with `await bus.request(Calculator.add, Add(a=1, b=2))`. Workers of one class share the work as a
queue group.
"""

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

from bus import Bus, BusConfig, EndpointConfig, JobQueueConfig, LocalProtocolError, Middleware
from schemas.message import Message
from schemas.subjects import InvalidIdentifier, Subject
from workers.declaration import Declared, DeclaredEndpoint, DeclaredJob, EventHandler, declared

DRAIN_TIMEOUT_S = 10.0
"""A request in flight gets this long after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""

_LOG = logging.getLogger(__name__)


class Worker:
    """One service in one process."""

    role: ClassVar[str] = "worker"
    """What it is called in worker ids and in discovery; the class's name in lower case unless it is set."""
    group: str = ""
    """What its endpoints' subjects have in common. One that is written in the class or inherited from a class that
    writes it; else the class's own `role`, so that two subclasses of one base don't share their requests."""
    needs_data_plane: ClassVar[bool] = False
    """Whether it moves tensors."""
    timeout_s: float = 60.0
    """What a request may take that brings no deadline, and whose endpoint doesn't say."""
    middleware: ClassVar[Sequence[Middleware]] = ()
    """Around every endpoint, the outermost first."""
    _own_group: ClassVar[str | None] = None
    """What the class itself writes as its group."""

    def __init__(self, bus: Bus) -> None:
        """A subclass may take more: what it depends on."""
        self.bus = bus
        self._is_serving = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "role" not in cls.__dict__:
            cls.role = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__.lstrip("_")).lower()
        if "_own_group" not in cls.__dict__:  # it is there in a class that a decorator has made anew
            cls._own_group = cls.__dict__.get("group")
        cls.group = _written_group(cls) or cls.role

    async def start(self) -> None:
        """Called before anything is served: load what that needs. It is cancelled if the worker is told to stop."""

    async def stop(self) -> None:
        """Called after everything has drained, if `start` returned."""

    @property
    def not_ready(self) -> str:
        """Why work should go elsewhere now, "" if it shouldn't: not serving yet, or what the bus says."""
        return self.bus.not_ready if self._is_serving else "starting"

    def metadata(self) -> dict[str, str]:
        """What service discovery tells of this worker."""
        return {"role": self.role, "graph": self.group}

    async def emit(self, kind: str, event: Message) -> None:
        """Publish an event of this worker, to the `on_event(kind)` handlers of all. Raises `ConnectionLost`."""
        await self.bus.publish(self.bus.subjects.event(self.bus.worker_id, kind), event)

    async def serve(self) -> None:
        """Serve what the class declares, and appear in discovery.

        Raises `TypeError` for a declaration without its types or with settings that can't be used, and for two of one
        subject, before anything is served; it names the method.
        """
        endpoints = [(found, self._endpoint_config(found)) for found in declared(type(self), DeclaredEndpoint)]
        handlers = [(found, self._events(found)) for found in declared(type(self), EventHandler)]
        jobs = [(found, self._queue(found)) for found in declared(type(self), DeclaredJob)]
        self._refuse_doubles((found, config.subject) for found, config in endpoints)
        self._refuse_doubles((found, queue.subject(self.bus.subjects)) for found, queue in jobs)
        if not (endpoints or handlers or jobs) and type(self).start is Worker.start:
            _LOG.warning("%s serves nothing: it has no @endpoint, @job or @on_event", type(self).__qualname__)
        for found, config in endpoints:
            await self.bus.serve(config, found.bound(self))
        for handler, subjects in handlers:
            await self.bus.subscribe(
                subjects,
                handler.request_type,
                handler.bound(self),
                queue_group=handler.queue_group,
                concurrency=handler.concurrency,
                timeout_s=self.timeout_s,
                middleware=tuple(self.middleware),
            )
        for declared_job, queue in jobs:
            await self.bus.work(queue, declared_job.bound(self))
        if self.needs_data_plane:
            from workers import performance  # it needs torch, which workers without tensors don't

            await performance.serve(self.bus)
        await self.bus.announce(f"nixlbus-{self.group}-{self.role}", package_version(), self.metadata())
        self._is_serving = True

    @classmethod
    @asynccontextmanager
    async def running(
        cls, config: BusConfig, *dependencies: Any, drain_timeout_s: float = DRAIN_TIMEOUT_S, **more: Any
    ) -> AsyncIterator[Self]:
        """A worker that serves for as long as the context lasts; `dependencies` are what its constructor takes besides.

        Raises what `Bus.open`, `start` and `serve` raise.
        """
        async with Bus.open(config, data_plane=cls.needs_data_plane, drain_timeout_s=drain_timeout_s) as bus:
            worker = cls(bus, *dependencies, **more)
            async with worker.serving(drain_timeout_s):
                yield worker

    @asynccontextmanager
    async def serving(self, drain_timeout_s: float = DRAIN_TIMEOUT_S) -> AsyncIterator[None]:
        """Start, serve, and at the end drain and stop.

        `stop` follows a `start` that returned, whatever fails or is cancelled after it; a `start` that doesn't return
        cleans up after itself. Cancelled while it drains, it drains no longer: whose request is left is told so.
        """
        await self.start()
        try:
            try:
                await self.serve()
                yield
            finally:
                await self._drain(drain_timeout_s)
        finally:
            await self.stop()

    async def _drain(self, timeout_s: float) -> None:
        try:
            await self.bus.drain(timeout_s)
        except asyncio.CancelledError:
            await self.bus.drain(0.0)
            raise

    def _endpoint_config(self, found: DeclaredEndpoint) -> EndpointConfig:
        options = found.options
        subjects = self.bus.subjects
        with self._naming(found):
            if options.direct:
                subject, queue_group = subjects.worker(self.bus.worker_id, found.stage), ""
            else:
                subject = subjects.graph(self.group, found.stage)
                queue_group = found.stage if options.queue_group is None else options.queue_group
            return EndpointConfig(
                name=found.stage,
                subject=subject,
                request_type=found.request_type,
                queue_group=queue_group,
                concurrency=options.concurrency,
                max_queued=options.max_queued,
                default_ttl_s=self.timeout_s if options.timeout_s is None else options.timeout_s,
                public=options.public,
                middleware=(*self.middleware, *options.middleware),
                reply_type=found.reply_type,
            )

    def _events(self, found: EventHandler[Any]) -> tuple[Subject, ...]:
        """The subjects of a handler's events, all that is said about it having been checked."""
        with self._naming(found):
            subjects = self.bus.subjects.events(found.kind)
            EndpointConfig(
                found.kind,
                subjects[0],
                found.request_type,
                concurrency=found.concurrency,
                default_ttl_s=self.timeout_s,
                one_way=True,
            )
        return subjects

    def _queue(self, found: DeclaredJob[Any]) -> JobQueueConfig[Any]:
        with self._naming(found):
            return found.within(self.group)

    @contextmanager
    def _naming(self, found: Declared) -> Iterator[None]:
        """Say of what can't be used where it was written."""
        try:
            yield
        except (LocalProtocolError, InvalidIdentifier) as error:
            raise TypeError(f"{self._name_of(found)} can't be served: {error}") from None

    def _name_of(self, found: Declared) -> str:
        return f"{type(self).__qualname__}.{found.method.__name__}"

    def _refuse_doubles(self, listeners: Iterable[tuple[Declared, Subject]]) -> None:
        heard: dict[str, Declared] = {}
        for found, subject in listeners:
            other = heard.setdefault(subject.name, found)
            if other is not found:
                raise TypeError(
                    f"{self._name_of(other)} and {self._name_of(found)} both listen on {subject.template}: "
                    "each would get a part of what is sent to the other; name one of them otherwise"
                )


def _written_group(worker_type: type) -> str:
    """What the class, or the nearest of its bases that writes a group, says; "" if none does."""
    written = (each.__dict__.get("_own_group", each.__dict__.get("group")) for each in worker_type.__mro__)
    return next((group for group in written if group is not None), "")


def package_version() -> str:
    """The version of the installed package."""
    try:
        return version("nixlbus")
    except PackageNotFoundError:
        return "0.0.0"
