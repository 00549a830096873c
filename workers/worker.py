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
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, ClassVar, Self

from bus import Bus, BusConfig, EndpointConfig, Middleware
from schemas.message import Message
from workers.declaration import DeclaredEndpoint, DeclaredJob, EventHandler, declared

DRAIN_TIMEOUT_S = 10.0
"""A request in flight gets this long after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""


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

        Raises `TypeError` for a declaration without its types, before anything is served.
        """
        endpoints = [
            (self._endpoint_config(found), found.bound(self)) for found in declared(type(self), DeclaredEndpoint)
        ]
        handlers = [(found, found.request_type) for found in declared(type(self), EventHandler)]
        jobs = [(found.within(self.group), found.bound(self)) for found in declared(type(self), DeclaredJob)]
        for config, method in endpoints:
            await self.bus.serve(config, method)
        for handler, event_type in handlers:
            await self.bus.subscribe(
                self.bus.subjects.events(handler.kind),
                event_type,
                handler.bound(self),
                queue_group=handler.queue_group,
                concurrency=handler.concurrency,
                timeout_s=self.timeout_s,
                middleware=tuple(self.middleware),
            )
        for queue, method in jobs:
            await self.bus.work(queue, method)
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
