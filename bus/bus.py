"""`Bus`: one worker's place on both lanes, and the public face of everything below it.

In: a `BusConfig`. Out: typed calls and endpoints over NATS, paired operations over NIXL, discovery.
Opening connects to NATS and, with `data_plane=True`, makes the NIXL agent, registers the arena, and begins to answer
handshakes, claims and acks; nixl and torch are imported then and not before. Closing drains: endpoints finish what
they took, operations end or are fenced, then the connections go.
"""

import asyncio
import inspect
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar, overload

from bus.config import BusConfig
from bus.control_plane.call import DEFAULT_WINDOW_FRAMES, Caller, CallMeter, packed, trace_headers
from bus.control_plane.connection import Connection, Msg, redacted
from bus.control_plane.credentials import connect_options
from bus.control_plane.declaration import StreamCall, UnaryCall
from bus.control_plane.discovery import Service, ServiceIdentity, discover
from bus.control_plane.endpoint import Endpoint, EndpointConfig, Handler
from bus.control_plane.inbox import Inbox
from bus.control_plane.request_context import Middleware
from bus.control_plane.retry import ONCE, RetryPolicy
from bus.data_lane import REAPED_EVENT, DataLane
from bus.data_plane.memory import RegisteredMemory, TensorArena
from bus.deadline import Deadline
from bus.errors import AuthenticationError, BusError, LocalProtocolError, RemoteFault
from bus.handshake import exchange, statements
from bus.handshake.authentication import KeyRing
from bus.jobs.consumer import JobConsumer
from bus.jobs.dead_letters import DeadLetters
from bus.jobs.durable_work import DurableWork
from bus.jobs.media import MediaStore
from bus.jobs.queue import JobQueueConfig, JobReceipt
from bus.jobs.settlement import JobHandler
from bus.operations import dynamo
from bus.operations.claim import Claim, PendingClaim, claim
from bus.operations.grants import GrantTerms
from bus.operations.initiator import (
    ActiveOperation,
    OperationReport,
    Progress,
    ReadOperation,
    WriteOperation,
    begin,
)
from bus.operations.lanes import lanes_to
from bus.operations.target import PassiveOperation, ReadableOperation, WritableOperation
from bus.targets import incomplete, subjects_of, wrong_target
from observability.active_span import Span
from observability.tracing import current_span
from schemas.dynamo import DynamoMetadata
from schemas.handshake import AgentMetadataRequest
from schemas.message import Message
from schemas.operations import Initiator, OperationKind, ProcessIdentity, RdmaMetadata
from schemas.stream import StreamEnd
from schemas.subjects import Subject, Subjects

LocalData = Any
"""Local memory of an operation: what `RegisteredMemory.describe` takes."""

Remote = RdmaMetadata | Claim | DynamoMetadata
"""What an operation is begun with."""

T = TypeVar("T")
F = TypeVar("F")
Q = TypeVar("Q", bound=Message)
M = TypeVar("M", bound=Message)


class Bus:
    """Made by `Bus.open`, and at home on its event loop. Operations may be created, begun and awaited from any other
    loop of the process as well; calls and endpoints are for the home loop."""

    def __init__(self, config: BusConfig, connection: Connection) -> None:
        self.config = config
        self.subjects = Subjects(config.prefix)
        self.epoch = secrets.token_hex(8)
        """Fresh at each start: what was granted before a restart is refused after it."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._inbox = Inbox(connection)
        self._caller = Caller(connection, self._inbox, self.subjects)
        self._durable = DurableWork(connection, self._inbox, config, self.subjects, self.epoch)
        self._endpoints: list[Endpoint] = []
        self._hears_cancellations = False
        self._is_draining = False
        self._service: Service | None = None
        self._data_plane: DataLane | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: BusConfig, *, data_plane: bool = True, drain_timeout_s: float = 10.0
    ) -> AsyncIterator["Bus"]:
        """Open both lanes (or NATS alone) and close them at the end of the context.

        Raises `ConfigError` for credentials that can't be used, `ConnectionLost`, `PermissionDenied` where the server
        grants not even the inbox, `RegistrationError`, and `KeyFileError` where the data plane's key is missing.
        """
        options = connect_options(config)
        connection = await Connection.open(config.nats_url, config.worker_id, config.connect_timeout_s, options=options)
        try:
            bus = cls(config, connection)
            try:
                await bus._inbox.open()
                if data_plane:
                    await bus._open_data_plane()
                await connection.confirm_subscriptions(config.connect_timeout_s)
                yield bus
            finally:
                await bus._close(drain_timeout_s)
        finally:
            await connection.close()

    @property
    def worker_id(self) -> str:
        """Who we are on the bus."""
        return self.config.worker_id

    @property
    def server(self) -> str:
        """The NATS server's URL, without credentials."""
        return redacted(self.config.nats_url)

    @overload
    def request(
        self,
        call: UnaryCall[Q, M],
        message: Q,
        /,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
    ) -> Coroutine[Any, Any, M]: ...

    @overload
    def request(
        self,
        subject: Subject,
        message: Message,
        reply_type: type[M],
        /,
        *,
        timeout_s: float,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
    ) -> Coroutine[Any, Any, M]: ...

    def request(
        self,
        target: UnaryCall[Any, Any] | Subject,
        message: Message,
        reply_type: Any = None,
        /,
        *,
        timeout_s: float | None = None,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
    ) -> Coroutine[Any, Any, Any]:
        """Send a typed request and return its reply.

        `target`: an endpoint of a worker's class (`Calculator.add`), which brings its reply's type, time and retries;
        or a subject, with `reply_type` and `timeout_s`, sent once unless `retry` says otherwise. If the awaiting task
        is cancelled, so is the work.

        Raises `RemoteFault`, `NoResponders`, `DeadlineExceeded`, `ConnectionLost`, `PermissionDenied`,
        `PayloadTooLarge`, `RemoteProtocolError`; each as soon as it is known; and `LocalProtocolError` for a target
        that isn't asked so, or a message that can't be encoded.
        """
        if isinstance(target, UnaryCall):
            subject, reply_type = target.place.subject(self.subjects), target.reply_type
            timeout_s = target.timeout_s if timeout_s is None else timeout_s
            retry = retry or target.retry
        elif isinstance(target, Subject):
            subject = target
        else:
            raise wrong_target(target, "request")
        if timeout_s is None or reply_type is None:
            raise incomplete("request", "timeout_s" if timeout_s is None else "type of the reply")
        return self._caller.request(subject, message, reply_type, timeout_s=timeout_s, meter=meter, retry=retry or ONCE)

    @overload
    def stream(
        self,
        call: StreamCall[Q, F],
        message: Q,
        /,
        *,
        timeout_s: float | None = None,
        window_frames: int = DEFAULT_WINDOW_FRAMES,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
        parent: Span | None = None,
    ) -> AsyncGenerator[F, None]: ...

    @overload
    def stream(
        self,
        subject: Subject,
        message: Message,
        frame_type: Any,
        last_type: type[Message] = ...,
        /,
        *,
        timeout_s: float,
        window_frames: int = DEFAULT_WINDOW_FRAMES,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
        parent: Span | None = None,
    ) -> AsyncGenerator[Any, None]: ...

    def stream(
        self,
        target: StreamCall[Any, Any] | Subject,
        message: Message,
        frame_type: Any = None,
        last_type: type[Message] = StreamEnd,
        /,
        *,
        timeout_s: float | None = None,
        window_frames: int = DEFAULT_WINDOW_FRAMES,
        retry: RetryPolicy | None = None,
        meter: CallMeter | None = None,
        parent: Span | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send a typed request and yield the frames of its answer; see `Caller.stream`.

        Arguments as for `request`. Close it with `contextlib.aclosing`: a stream that nobody reads any further is then
        cancelled at once.
        """
        if isinstance(target, StreamCall):
            subject, frame_type = target.place.subject(self.subjects), target.frame_type
            timeout_s = target.timeout_s if timeout_s is None else timeout_s
            retry = retry or target.retry
        elif isinstance(target, Subject):
            subject = target
        else:
            raise wrong_target(target, "stream")
        if timeout_s is None or frame_type is None:
            raise incomplete("stream", "timeout_s" if timeout_s is None else "type of its frames")
        return self._caller.stream(
            subject,
            message,
            frame_type,
            last_type,
            timeout_s=timeout_s,
            window_frames=window_frames,
            meter=meter,
            parent=parent,
            retry=retry or ONCE,
        )

    @overload
    def request_many(
        self,
        call: UnaryCall[Q, M],
        message: Q,
        /,
        *,
        timeout_s: float | None = None,
        quiet_s: float | None = None,
        max_replies: int | None = None,
    ) -> AsyncGenerator[M | RemoteFault, None]: ...

    @overload
    def request_many(
        self,
        subject: Subject,
        message: Message,
        reply_type: type[M],
        /,
        *,
        timeout_s: float,
        quiet_s: float | None = None,
        max_replies: int | None = None,
    ) -> AsyncGenerator[M | RemoteFault, None]: ...

    def request_many(
        self,
        target: UnaryCall[Any, Any] | Subject,
        message: Message,
        reply_type: Any = None,
        /,
        *,
        timeout_s: float | None = None,
        quiet_s: float | None = None,
        max_replies: int | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Ask everybody who listens and yield their replies, or their `RemoteFault`s, as they come.

        `target`: as for `request`; an endpoint that every instance hears is declared with `queue_group=""`. It ends
        after `timeout_s`, `quiet_s` without a further reply, or `max_replies`. Raises `NoResponders`, `ConnectionLost`.
        """
        if isinstance(target, UnaryCall):
            subject, reply_type = target.place.subject(self.subjects), target.reply_type
            timeout_s = target.timeout_s if timeout_s is None else timeout_s
        elif isinstance(target, Subject):
            subject = target
        else:
            raise wrong_target(target, "request_many")
        if timeout_s is None:
            raise incomplete("request_many", "timeout_s")
        return self._caller.request_many(
            subject, message, reply_type, timeout_s=timeout_s, quiet_s=quiet_s, max_replies=max_replies
        )

    async def publish(self, subject: Subject, message: Message) -> None:
        """Publish without an answer: an event. Raises `ConnectionLost`, `PayloadTooLarge`, `LocalProtocolError`."""
        if not isinstance(subject, Subject):
            raise wrong_target(subject, "publish")
        lines = trace_headers(current_span())
        headers = f"NATS/1.0\r\n{lines}\r\n".encode() if lines else None
        await self._connection.publish(subject, packed(message), headers=headers)

    async def subscribe(
        self,
        subject: Subject | Sequence[Subject],
        message_type: type[M],
        callback: Callable[[M], Any],
        *,
        queue_group: str = "",
        concurrency: int = 1,
        max_queued: int = 4096,
        timeout_s: float = 60.0,
        middleware: tuple[Middleware, ...] = (),
    ) -> None:
        """Call `callback` with every message of `message_type` on `subject` until the bus closes.

        `subject` may be several, such as `bus.subjects.events(kind)`; each has a queue of its own then.
        For one-way messages; what isn't a `message_type` is dropped and counted, and so is what finds `max_queued`
        waiting. With a `concurrency` of 1 they come in order: a coroutine function is awaited, for at most `timeout_s`,
        before the next. With a `queue_group` each message reaches one of its members.
        """

        async def handler(event: M) -> None:
            result = callback(event)
            if inspect.isawaitable(result):
                await result

        for each in subjects_of(subject, "subscribe"):
            config = EndpointConfig(
                name=each.template.rpartition(".")[2],
                subject=each,
                request_type=message_type,
                queue_group=queue_group,
                concurrency=concurrency,
                max_queued=max_queued,
                default_ttl_s=timeout_s,
                one_way=True,
                middleware=middleware,
            )
            await self.serve(config, handler)

    async def serve(self, config: EndpointConfig, handler: Handler) -> None:
        """Serve a subject until the bus closes: `handler` takes the request and returns the reply or yields frames.

        When this returns, NATS knows of it: a request published after that is served.
        """
        if not self._hears_cancellations:
            await self._connection.subscribe(self.subjects.cancellations(), self._on_cancellation)
            self._hears_cancellations = True
        endpoint = Endpoint(self._connection, self._inbox, self.worker_id, config, handler)
        self._endpoints.append(endpoint)
        try:
            await endpoint.open()
            await self._connection.confirm_subscriptions(self.config.connect_timeout_s, config.subject)
        except BaseException:
            self._endpoints.remove(endpoint)
            await endpoint.drain(0.0)
            raise

    async def work(self, config: JobQueueConfig, handler: JobHandler) -> JobConsumer:
        """Work on a queue of durable jobs until the bus closes: `handler` takes a message, and its return is the ack.

        The stream and the consumer are made where they are missing. A handler that raises has its job delivered again
        after a pause, `config.max_deliver` times; then, or at once for a fault that would come again (bad input), it
        is a dead letter. Raises `DurableWorkUnavailable`, `PermissionDenied`, `ConnectionLost`.
        """
        return await self._durable.work(config, handler)

    async def submit(
        self,
        queue: JobQueueConfig[M] | Subject,
        message: M,
        *,
        job_id: str = "",
        ttl_s: float | None = None,
        timeout_s: float = 5.0,
    ) -> JobReceipt:
        """Store a durable job; when this returns, it will be done or be a dead letter, whoever dies.

        `queue`: its declaration, or `bus.subjects.job(graph, queue)`. `job_id`: the same job submitted again is not
        stored again (for two minutes) and not run again (for a day); if empty, one is made that no other job has, which
        costs less. `ttl_s`: how long it makes sense, counted from now; then it is a dead letter. `timeout_s`: for the
        server's confirmation. After an error of the connection it may have been stored: submit it again, with its
        `job_id`.

        Raises `LocalProtocolError`, `PayloadTooLarge`, `DurableWorkUnavailable`, `PermissionDenied`, `ConnectionLost`,
        `DeadlineExceeded`.
        """
        if not isinstance(queue, (JobQueueConfig, Subject)):
            raise wrong_target(queue, "submit")
        return await self._durable.submit(queue, message, job_id=job_id, ttl_s=ttl_s, timeout_s=timeout_s)

    async def provision(self, queues: Sequence[JobQueueConfig] = (), *, media: bool = False) -> list[str]:
        """Make the streams and consumers of `queues` and of large messages where they are missing; return the names.

        For an operator, so that workers need no right to make any (docs/security.md); without it they are made when
        they are first missed. What is there stays as it is. Raises `DurableWorkUnavailable`, `PermissionDenied`,
        `ConnectionLost`, `DeadlineExceeded`.
        """
        return await self._durable.provision(queues, media=media)

    @property
    def dead_letters(self) -> DeadLetters:
        """Jobs that were given up: list, show, replay, drop."""
        return self._durable.dead_letters

    @property
    def media(self) -> MediaStore:
        """The object store for what is over max_payload: `put` returns a reference to send, `get` takes one."""
        return self._durable.media

    async def announce(self, name: str, version: str, metadata: dict[str, str]) -> None:
        """Appear in service discovery with the endpoints served so far, and be certain that NATS knows them."""
        identity = ServiceIdentity(
            name=name,
            id=self.worker_id,
            version=version,
            metadata={"nixlbus": version, "epoch": self.epoch, **metadata},
        )
        shown = [endpoint for endpoint in self._endpoints if endpoint.config.traced]
        self._service = Service(self._connection, identity, [*shown, *self._durable.consumers])
        await self._service.open()
        await self._connection.confirm_subscriptions(self.config.connect_timeout_s)

    async def services(self, timeout_s: float = 2.0) -> list[dict[str, Any]]:
        """The live workers of this bus."""
        return await discover(self._connection, self._inbox, timeout_s=timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, take no further requests, and finish those that were taken; operations go on meanwhile."""
        self._is_draining = True
        if self._service:
            await self._service.close()
            self._service = None
        serving = [endpoint for endpoint in self._endpoints if endpoint.config.traced]
        await asyncio.gather(self._durable.drain(timeout_s), *(endpoint.drain(timeout_s) for endpoint in serving))
        self._endpoints = [endpoint for endpoint in self._endpoints if not endpoint.config.traced]

    @property
    def has_data_plane(self) -> bool:
        """Whether it was opened with its data plane."""
        return self._data_plane is not None

    @property
    def arena(self) -> TensorArena:
        """Registered memory: `bus.arena.allocate(shape, dtype)`, from any thread."""
        return self._lane().arena

    @property
    def memory(self) -> RegisteredMemory:
        """The regions that this worker registered, for pools that live on the bus."""
        return self._lane().memory

    @property
    def backend(self) -> str:
        """NIXL's name for what moves the bytes: UCX."""
        return self._lane().engine.agent.backend

    @property
    def overrun(self) -> "asyncio.Future[str]":
        """Resolves when more memory is fenced than allowed: nothing more is granted, and the worker should stop."""
        return self._lane().grants.overrun

    @property
    def is_ready(self) -> bool:
        """Whether it is connected, may grant memory, and isn't draining; `not_ready` tells what is amiss."""
        return not self.not_ready

    @property
    def not_ready(self) -> str:
        """Why work should go elsewhere now, "" if it shouldn't."""
        lane = self._data_plane
        if not self._connection.is_connected:
            return "not connected to NATS"
        if lane is not None and lane.grants.is_overrun:
            return "too much memory is fenced"
        return "draining" if self._is_draining else ""

    def register(self, data: Any) -> None:
        """Register memory for the life of the process; what isn't registered is when an operation first uses it.

        Raises `NotContiguous`, `InvalidDescriptor`, `RegistrationError`.
        """
        self._lane().memory.add(data)

    async def create_readable(
        self,
        local: LocalData,
        *,
        name: str = "nixl",
        lease_s: float | None = None,
        initiator: Initiator | None = None,
        max_claims: int = 1,
        checksum: bool | None = None,
        allow_unauthenticated: bool = False,
    ) -> ReadableOperation:
        """Let peers read `local`; send the operation's `metadata` to them in any message, and await the operation.

        `local`: a tensor, an array, a bytes-like, a `Descriptor`, an `ArenaTensor`, or a list of these. `lease_s`: how
        long the grant lasts (`BusConfig.operation_lease_s`). `initiator`: who may; without it the first `max_claims`
        workers to claim it. `checksum`: whether the reader proves what it got. `allow_unauthenticated`: for a
        `dynamo.nixl_connect` initiator, see `ReadableOperation.to_dynamo`. `name`: of the wait's span.

        Raises `NotContiguous`, `InvalidDescriptor`, `LocalProtocolError`, `PoolExhausted`. From any event loop.
        """
        terms = GrantTerms(
            OperationKind.READABLE,
            Deadline.after(self.config.operation_lease_s if lease_s is None else lease_s),
            name,
            initiator,
            max_claims,
            self.config.checksum if checksum is None else checksum,
            allow_unauthenticated,
        )
        operation = await self._at_home(self._grant(local, terms))
        assert isinstance(operation, ReadableOperation)
        return operation

    async def create_writable(
        self,
        local: LocalData,
        *,
        name: str = "nixl",
        lease_s: float | None = None,
        initiator: Initiator | None = None,
        checksum: bool | None = None,
        allow_unauthenticated: bool = False,
    ) -> WritableOperation:
        """Let a peer write `local`; send the operation's `metadata` to it in any message, and await the operation.

        Arguments as for `create_readable`. Raises the same, and `ReadOnlyMemory`. From any event loop.
        """
        terms = GrantTerms(
            OperationKind.WRITABLE,
            Deadline.after(self.config.operation_lease_s if lease_s is None else lease_s),
            name,
            initiator,
            1,
            self.config.checksum if checksum is None else checksum,
            allow_unauthenticated,
        )
        operation = await self._at_home(self._grant(local, terms))
        assert isinstance(operation, WritableOperation)
        return operation

    async def claim(self, metadata: RdmaMetadata) -> Claim:
        """Make a peer's grant ours ahead of the transfer, beside other work; see `claim`."""
        return await self._at_home(claim(self._lane().lanes, metadata))

    def claim_ahead(self, metadata: RdmaMetadata) -> PendingClaim:
        """Claim in the background: `async with bus.claim_ahead(grant) as pending`, then `await pending.granted()`."""
        return PendingClaim(self._lane().lanes, metadata)

    async def begin_read(
        self,
        remote: Remote,
        local: LocalData,
        *,
        on_progress: Progress | None = None,
        allow_unauthenticated: bool = False,
    ) -> ReadOperation:
        """Read the memory of a peer's `create_readable` into `local`; await the operation.

        `remote`: the peer's metadata, a `Claim` on it, or with `allow_unauthenticated` what `RdmaMetadata.from_dynamo`
        returns. `on_progress` is told the bytes that are done, after each chunk of a large transfer.

        Raises `WrongPairing`, `WrongLength`, `WrongLayout`, `ReadOnlyMemory`, `StaleGrant`, `ForeignGrant`,
        `LeaseExpired`, `NoResponders`, `AuthenticationError`; nothing was posted then. From any event loop.
        """
        operation = await self._at_home(
            self._begin(OperationKind.READABLE, remote, local, on_progress, allow_unauthenticated)
        )
        assert isinstance(operation, ReadOperation)
        return operation

    async def begin_write(
        self,
        remote: Remote,
        local: LocalData,
        *,
        on_progress: Progress | None = None,
        allow_unauthenticated: bool = False,
    ) -> WriteOperation:
        """Write `local` into the memory of a peer's `create_writable`; await the operation. As `begin_read`."""
        operation = await self._at_home(
            self._begin(OperationKind.WRITABLE, remote, local, on_progress, allow_unauthenticated)
        )
        assert isinstance(operation, WriteOperation)
        return operation

    async def write_to_all(self, remotes: Sequence[RdmaMetadata], local: LocalData) -> list[OperationReport | BusError]:
        """Write one memory into many targets at once; returns, in their order, the report or the error of each."""

        async def write(remote: RdmaMetadata) -> OperationReport | BusError:
            try:
                return await (await self.begin_write(remote, local))
            except BusError as error:
                return error

        async with asyncio.TaskGroup() as group:
            writes = [group.create_task(write(remote)) for remote in remotes]
        return [each.result() for each in writes]

    async def lanes_to(self, remote: RdmaMetadata) -> str:
        """The lanes that UCX takes to a grant's owner, in its own words: `intra-node rma_am(tcp/lo) am(cma/memory)`.

        Another process, which takes half a second, writes zeros into the granted memory: let the target reserve some.
        Raises what `begin_write` raises, `TransferError`, `DeadlineExceeded`, and `DataPlaneError` if UCX is silent.
        """
        return await self._at_home(lanes_to(self._lane().lanes, remote))

    async def report_reaped(self, worker_id: str, process: ProcessIdentity) -> None:
        """As a supervisor: tell the bus that a worker's process has ended and was waited for.

        Whoever fenced memory for it frees it. Raises `KeyFileError`.
        """
        report = statements.process_reaped(KeyRing.load(self.config.key_file), worker_id, process)
        await self.publish(self.subjects.event(worker_id, REAPED_EVENT), report)

    def stats(self) -> dict[str, int]:
        """Counters of this worker: requests in flight, registrations, grants, transfers."""
        counters = {"requests_in_flight": self._inbox.num_waiters, "jobs_in_flight": self._durable.num_active}
        counters |= {f"nats_{name}": value for name, value in self._connection.statistics().items()}
        return counters | (self._data_plane.stats() if self._data_plane else {})

    def _on_cancellation(self, message: Msg) -> None:
        request_id = message.subject.rpartition(".")[2]
        for endpoint in self._endpoints:
            if endpoint.cancel(request_id):
                return

    async def _grant(self, local: LocalData, terms: GrantTerms) -> PassiveOperation:
        lane = self._lane()
        return await lane.grants.create(local, terms)

    async def _begin(
        self,
        kind: OperationKind,
        remote: Remote,
        local: LocalData,
        on_progress: Progress | None,
        allow_unauthenticated: bool,
    ) -> ActiveOperation:
        lane = self._lane()
        if not isinstance(remote, DynamoMetadata):
            return await begin(lane.lanes, kind, remote, local, on_progress)
        if not allow_unauthenticated:
            raise AuthenticationError(
                "Dynamo's metadata carries no proof of who made it",
                remedy="pass allow_unauthenticated=True if whoever can send it may crash this process",
            )
        return await dynamo.begin(lane.lanes, kind, remote, local, self.config.operation_lease_s, on_progress)

    async def _at_home(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` on the event loop that the bus lives on, whichever loop and thread the caller is on."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _lane(self) -> DataLane:
        if self._data_plane is None:
            raise LocalProtocolError(
                "this bus was opened without its data plane",
                remedy="open it with Bus.open(config, data_plane=True)",
            )
        return self._data_plane

    async def _open_data_plane(self) -> None:
        lane = await DataLane.open(self.config, self.epoch, self.subjects, self._connection, self._caller)
        self._data_plane = lane
        subject = self.subjects.worker(self.worker_id, exchange.ENDPOINT)
        endpoint = EndpointConfig(exchange.ENDPOINT, subject, AgentMetadataRequest, max_queued=4096, traced=False)
        await self.serve(endpoint, lane.answer_introduction)
        await lane.serve()

    async def _close(self, timeout_s: float) -> None:
        await self.drain(timeout_s)
        if self._data_plane:
            await self._data_plane.close(timeout_s)
        await asyncio.gather(*(endpoint.drain(1.0) for endpoint in self._endpoints))
