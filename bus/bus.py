"""`Bus`: one worker's place on both lanes, and the public face of everything below it.

In: a `BusConfig`. Out: typed calls and endpoints over NATS, paired operations over NIXL, discovery.
Opening connects to NATS and, with `data_plane=True`, makes the NIXL agent, registers the arena, and begins to answer
handshakes, claims and acks; nixl and torch are imported then and not before. Closing drains: endpoints finish what
they took, operations end or are fenced, then the connections go.
"""

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from bus.config import BusConfig
from bus.control_plane.call import Caller, CallMeter
from bus.control_plane.connection import Connection, Msg, redacted
from bus.control_plane.discovery import Service, ServiceIdentity, discover
from bus.control_plane.endpoint import Endpoint, EndpointConfig, Handler
from bus.control_plane.inbox import Inbox
from bus.data_plane.agent import NixlAgent
from bus.data_plane.memory import Descriptor, RegisteredMemory, TensorArena
from bus.data_plane.transfer import TransferEngine
from bus.deadline import Deadline
from bus.errors import LocalProtocolError, RemoteProtocolError
from bus.handshake import exchange
from bus.handshake.authentication import KeyRing
from bus.operations import initiator
from bus.operations.claim import CLAIM_ENDPOINT, Claim, Lanes, PendingClaim, claim
from bus.operations.conclusions import Conclusions
from bus.operations.initiator import ReadOperation, WriteOperation
from bus.operations.target import Grants, PassiveOperation, ReadableOperation, WritableOperation
from observability.active_span import Span
from schemas.codec import MessageError, decode, encode
from schemas.handshake import AgentMetadataRequest
from schemas.message import Message
from schemas.operations import ClaimRequest, CompletionAck, Initiator, OperationKind, RdmaMetadata
from schemas.subjects import Subject, Subjects

if TYPE_CHECKING:
    import torch

M = TypeVar("M", bound=Message)
_LOG = logging.getLogger(__name__)


class Bus:
    """Made by `Bus.open`. Methods of one event loop; not for use from other threads."""

    def __init__(self, config: BusConfig, connection: Connection) -> None:
        self.config = config
        self.subjects = Subjects(config.prefix)
        self.epoch = secrets.token_hex(8)
        """Fresh at each start: what was granted before a restart is refused after it."""
        self._connection = connection
        self._inbox = Inbox(connection)
        self._caller = Caller(connection, self._inbox)
        self._endpoints: list[Endpoint] = []
        self._service: Service | None = None
        self._data_plane: _DataPlane | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls, config: BusConfig, *, data_plane: bool = True, drain_timeout_s: float = 10.0
    ) -> AsyncIterator["Bus"]:
        """Open both lanes (or NATS alone) and close them at the end of the context.

        Raises `ConnectionLost`, `RegistrationError`, and `KeyFileError` where the data plane's key is missing.
        """
        connection = await Connection.open(config.nats_url, config.worker_id, config.connect_timeout_s)
        try:
            bus = cls(config, connection)
            await bus._inbox.open()
            if data_plane:
                await bus._open_data_plane()
            await connection.confirm_subscriptions(config.connect_timeout_s)
            try:
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

    @property
    def connection_lost(self) -> "asyncio.Future[str]":
        """Resolves, with the reason, when NATS is gone for good."""
        return self._connection.closed

    async def request(
        self,
        subject: Subject,
        message: Message,
        reply_type: type[M],
        *,
        timeout_s: float,
        meter: CallMeter | None = None,
    ) -> M:
        """Send a typed request and return its reply; see `Caller.request`."""
        return await self._caller.request(subject, message, reply_type, timeout_s=timeout_s, meter=meter)

    def stream(
        self,
        subject: Subject,
        message: Message,
        frame_type: type[Message],
        last_type: type[Message],
        *,
        timeout_s: float,
        meter: CallMeter | None = None,
        parent: Span | None = None,
    ) -> AsyncGenerator[Any, None]:
        """Send a typed request and yield the frames of its answer; see `Caller.stream`. Close it with `aclosing`."""
        return self._caller.stream(
            subject, message, frame_type, last_type, timeout_s=timeout_s, meter=meter, parent=parent
        )

    async def publish(self, subject: Subject, message: Message) -> None:
        """Publish without an answer: an event."""
        await self._connection.publish(subject, encode(message))

    async def serve(self, config: EndpointConfig, handler: Handler) -> None:
        """Serve a subject until the bus closes: `handler` takes the request and returns the reply or yields frames.

        When this returns, NATS knows of it: a request published after that is served.
        """
        endpoint = Endpoint(self._connection, self.worker_id, config, handler)
        await endpoint.open()
        await self._connection.confirm_subscriptions(self.config.connect_timeout_s)
        self._endpoints.append(endpoint)

    async def announce(self, name: str, version: str, metadata: dict[str, str]) -> None:
        """Appear in service discovery with the endpoints served so far, and be certain that NATS knows them."""
        identity = ServiceIdentity(
            name=name,
            id=self.worker_id,
            version=version,
            metadata={"nixlbus": version, "epoch": self.epoch, **metadata},
        )
        self._service = Service(self._connection, identity, [e for e in self._endpoints if e.config.traced])
        await self._service.open()
        await self._connection.confirm_subscriptions(self.config.connect_timeout_s)

    async def services(self, timeout_s: float = 2.0) -> list[dict[str, Any]]:
        """The live workers of this bus."""
        return await discover(self._connection, self._inbox, timeout_s=timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Leave discovery, take no further requests, and finish those that were taken; operations go on meanwhile."""
        if self._service:
            await self._service.close()
            self._service = None
        serving = [endpoint for endpoint in self._endpoints if endpoint.config.traced]
        self._endpoints = [endpoint for endpoint in self._endpoints if not endpoint.config.traced]
        await asyncio.gather(*(endpoint.drain(timeout_s) for endpoint in serving))

    @property
    def arena(self) -> TensorArena:
        """Registered memory: `bus.arena.allocate(shape, dtype)`."""
        return self._lane().arena

    @property
    def memory(self) -> RegisteredMemory:
        """The regions that this worker registered, for pools that live on the bus."""
        return self._lane().memory

    def register(self, tensor: "torch.Tensor") -> None:
        """Register a tensor's memory for the life of the process, so that operations can name it."""
        self._lane().memory.add(tensor)

    async def create_readable(
        self,
        local: "torch.Tensor | Descriptor",
        *,
        name: str = "nixl",
        lease_s: float | None = None,
        initiator: Initiator | None = None,
    ) -> ReadableOperation:
        """Let a peer read `local`; publish the operation's `metadata` and await the operation.

        `initiator` names who may; without it the first to claim it may. Raises `LocalProtocolError`.
        """
        operation = self._grant(OperationKind.READABLE, local, name, lease_s, initiator)
        assert isinstance(operation, ReadableOperation)
        return operation

    async def create_writable(
        self,
        local: "torch.Tensor | Descriptor",
        *,
        name: str = "nixl",
        lease_s: float | None = None,
        initiator: Initiator | None = None,
    ) -> WritableOperation:
        """Let a peer write `local`; publish the operation's `metadata` and await the operation.

        `initiator` names who may; without it the first to claim it may. Raises `LocalProtocolError`.
        """
        operation = self._grant(OperationKind.WRITABLE, local, name, lease_s, initiator)
        assert isinstance(operation, WritableOperation)
        return operation

    async def claim(self, metadata: RdmaMetadata) -> Claim:
        """Make a peer's grant ours ahead of the transfer, beside other work; see `claim`."""
        return await claim(self._lane().lanes, metadata)

    def claim_ahead(self, metadata: RdmaMetadata) -> PendingClaim:
        """Claim in the background: `async with bus.claim_ahead(grant) as pending`, then `await pending.granted()`."""
        return PendingClaim(self._lane().lanes, metadata)

    async def begin_read(self, remote: RdmaMetadata | Claim, local: "torch.Tensor | Descriptor") -> ReadOperation:
        """Read the memory of a peer's `create_readable` into `local`; await the operation. See `initiator.begin`."""
        operation = await self._begin(OperationKind.READABLE, remote, local)
        assert isinstance(operation, ReadOperation)
        return operation

    async def begin_write(self, remote: RdmaMetadata | Claim, local: "torch.Tensor | Descriptor") -> WriteOperation:
        """Write `local` into the memory of a peer's `create_writable`; await the operation. See `initiator.begin`."""
        operation = await self._begin(OperationKind.WRITABLE, remote, local)
        assert isinstance(operation, WriteOperation)
        return operation

    def stats(self) -> dict[str, int]:
        """Counters of this worker: requests in flight, registrations, grants, transfers."""
        counters = {"requests_in_flight": self._inbox.num_waiters}
        counters |= {f"nats_{name}": value for name, value in self._connection.statistics().items()}
        return counters | (self._data_plane.stats() if self._data_plane else {})

    def _grant(
        self,
        kind: OperationKind,
        local: "torch.Tensor | Descriptor",
        name: str,
        lease_s: float | None,
        named: Initiator | None,
    ) -> PassiveOperation:
        lane = self._lane()
        deadline = Deadline.after(lease_s if lease_s is not None else self.config.operation_lease_s)
        return lane.grants.create(kind, lane.described(local), deadline, name, named)

    async def _begin(
        self, kind: OperationKind, remote: RdmaMetadata | Claim, local: "torch.Tensor | Descriptor"
    ) -> initiator.ActiveOperation:
        lane = self._lane()
        return await initiator.begin(lane.lanes, kind, remote, lane.described(local))

    def _lane(self) -> "_DataPlane":
        if self._data_plane is None:
            raise LocalProtocolError(
                "this bus was opened without its data plane",
                remedy="open it with Bus.open(config, data_plane=True)",
            )
        return self._data_plane

    async def _open_data_plane(self) -> None:
        keys = KeyRing.load(self.config.key_file)
        lane = await _DataPlane.open(self, keys)
        self._data_plane = lane
        introduction = exchange.Introduction(self.worker_id, self.epoch, lane.engine.agent, lane.memory, keys)
        await self._serve_peers(exchange.ENDPOINT, AgentMetadataRequest, introduction.answer)
        await self._serve_peers(CLAIM_ENDPOINT, ClaimRequest, lane.grants.claim)
        await self._connection.subscribe(self.subjects.acks(self.worker_id), lane.on_ack)

    async def _serve_peers(self, endpoint: str, request_type: type[Message], handler: Handler) -> None:
        subject = self.subjects.worker(self.worker_id, endpoint)
        await self.serve(EndpointConfig(endpoint, subject, request_type, max_queued=4096, traced=False), handler)

    async def _close(self, timeout_s: float) -> None:
        await self.drain(timeout_s)
        if self._data_plane:
            await self._data_plane.close(timeout_s)
        await asyncio.gather(*(endpoint.drain(1.0) for endpoint in self._endpoints))


class _DataPlane:
    """What a bus holds of the data plane while it is open."""

    def __init__(
        self,
        memory: RegisteredMemory,
        arena: TensorArena,
        engine: TransferEngine,
        grants: Grants,
        lanes: Lanes,
    ) -> None:
        self.memory = memory
        self.arena = arena
        self.engine = engine
        self.grants = grants
        self.lanes = lanes

    @classmethod
    async def open(cls, bus: Bus, keys: KeyRing) -> "_DataPlane":
        config = bus.config
        agent = await asyncio.to_thread(NixlAgent, f"{bus.worker_id}-{bus.epoch}")
        memory = RegisteredMemory(agent)
        arena = memory.add_arena(config.arena_bytes)
        engine = TransferEngine(agent, chunk_bytes=config.chunk_bytes, inline_bytes=config.inline_bytes)
        peers = exchange.Peers(bus.worker_id, bus.subjects, bus._caller, engine, keys, config.handshake_timeout_s)
        identity = Initiator(worker_id=bus.worker_id, epoch=bus.epoch)
        lanes = Lanes(identity, bus.subjects, bus._connection, bus._caller, peers, memory, engine, Conclusions())
        return cls(memory, arena, engine, Grants(bus.worker_id, bus.epoch), lanes)

    def described(self, local: "torch.Tensor | Descriptor") -> Descriptor:
        return local if isinstance(local, Descriptor) else self.memory.describe(local)

    async def on_ack(self, message: Msg) -> None:
        try:
            ack = decode(message.data, CompletionAck)
        except MessageError as error:
            raise RemoteProtocolError(f"not an ack: {error}", subject=message.subject) from None
        self.grants.acknowledge(ack, message.headers)

    def stats(self) -> dict[str, int]:
        return {
            "arena_used_bytes": self.arena.arena.used_bytes,
            "arena_capacity_bytes": self.arena.arena.capacity_bytes,
            "registrations": self.memory.num_registrations,
            "handshakes": self.lanes.peers.num_handshakes,
            "grants_open": self.grants.num_open,
            "grants_quarantined": self.grants.num_quarantined,
            "acks_dropped": self.grants.num_dropped_acks,
            "operations_under_way": self.lanes.conclusions.num_open,
            "transfers_posted_inline": self.engine.num_posted_inline,
            "transfers_posted_by_thread": self.engine.num_posted_by_thread,
        }

    async def close(self, timeout_s: float) -> None:
        self.grants.cancel_all()
        await self.lanes.conclusions.close(timeout_s)
        await self.engine.close(timeout_s)
