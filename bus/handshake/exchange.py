"""The exchange of agent metadata between two workers: once per peer and epoch, authenticated, off the hot path.

In: a grant. Out: a `Peer` that transfers can go to, which knows every region that the grant names.
However many ask for one peer at once, one request is on the wire and all share its future; a failed one is forgotten,
so that the next request tries again. A region that was registered after the exchange is asked for by its number. A peer
is never removed: NIXL leaks a socket with each removal, on both sides. A peer of another epoch than asked for is a
`StaleGrant`: the epoch in the message refuses, not an event.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextvars import Context
from dataclasses import dataclass

from bus.control_plane.call import Caller
from bus.data_plane.addressing import AddressRange
from bus.data_plane.agent import NixlAgent
from bus.data_plane.memory import RegisteredMemory
from bus.data_plane.transfer_engine import TransferEngine
from bus.errors import RemoteProtocolError, StaleGrant
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from schemas.handshake import AgentDescription, AgentMetadataReply, AgentMetadataRequest, Region
from schemas.operations import Initiator, MemoryExtent, ProcessIdentity, RdmaMetadata
from schemas.subjects import Subjects

ENDPOINT = "agent_metadata"
MAX_KNOWN_REGIONS = 4096
"""Of one peer: memory that it registers on demand comes under ever new numbers."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker in one epoch whose agent ours can reach."""

    worker_id: str
    epoch: str
    agent_name: str
    regions: dict[int, Region]
    ack_prefix: str
    """Of the subjects that its acks go to: an operation id is to follow."""

    def knows(self, extents: Sequence[MemoryExtent]) -> bool:
        """Whether every region that `extents` name is known."""
        return all([extent.region in self.regions for extent in extents])  # noqa: C419  # on every operation's way


class Introduction:
    """The answering half: tells members who we are, and notes which process each of them is."""

    def __init__(
        self,
        identity: Initiator,
        agent: NixlAgent,
        memory: RegisteredMemory,
        keys: KeyRing,
        on_member: Callable[[Initiator, ProcessIdentity], None],
    ) -> None:
        self._identity = identity
        self._agent = agent
        self._memory = memory
        self._keys = keys
        self._on_member = on_member

    async def answer(self, request: AgentMetadataRequest) -> AgentMetadataReply:
        """Our description, signed for this request. Raises `AuthenticationError`."""
        statements.check_question(self._keys, request, self._identity.worker_id)
        assert request.process is not None  # check_question looked
        requester = Initiator(worker_id=request.requester, epoch=request.requester_epoch)
        self._on_member(requester, request.process)
        wanted = request.regions or self._memory.regions
        regions = [self._memory.regions[number] for number in wanted if number in self._memory.regions]
        description = AgentDescription(
            worker_id=self._identity.worker_id,
            epoch=self._identity.epoch,
            agent_name=self._agent.name,
            agent_metadata=self._metadata(regions if request.regions else None),
            regions=regions,
        )
        return statements.answer(self._keys, request, description)

    def _metadata(self, regions: list[Region] | None) -> bytes:
        if not regions or len({region.memory_type for region in regions}) > 1:
            return self._agent.metadata()
        ranges = [AddressRange(region.address, region.length_bytes, region.device_id) for region in regions]
        return self._agent.partial_metadata(regions[0].memory_type, ranges)


class Peers:
    """The asking half: the peers that this worker knows."""

    def __init__(
        self,
        identity: Initiator,
        process: ProcessIdentity,
        subjects: Subjects,
        caller: Caller,
        engine: TransferEngine,
        keys: KeyRing,
        timeout_s: float,
        own_regions: dict[int, Region],
    ) -> None:
        self._identity = identity
        self._process = process
        self._subjects = subjects
        self._caller = caller
        self._engine = engine
        self._keys = keys
        self._timeout_s = timeout_s
        ack_prefix = subjects.acks(identity.worker_id).name.removesuffix("*")
        ourselves = Peer(identity.worker_id, identity.epoch, engine.agent.name, own_regions, ack_prefix)
        self._peers = {(identity.worker_id, identity.epoch): ourselves}  # NIXL knows its own agent
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}
        self.num_handshakes = 0

    def known(self, metadata: RdmaMetadata) -> Peer | None:
        """The peer, where nothing is left to ask it."""
        peer = self._peers.get((metadata.worker_id, metadata.epoch))
        return peer if peer is not None and peer.knows(metadata.memory) else None

    async def ensure(self, metadata: RdmaMetadata) -> Peer:
        """The peer, known to NIXL with the regions that the grant names.

        Raises what the handshake raises, `AuthenticationError`, and `StaleGrant` for another epoch or a region that is
        no longer registered.
        """
        key = (metadata.worker_id, metadata.epoch)
        while (peer := self.known(metadata)) is None:
            asked_by_another = self._asking.get(key)
            if asked_by_another is not None:
                await asyncio.shield(asked_by_another)  # its answer may not be about our regions: look again
                continue
            asking = self._asking[key] = asyncio.create_task(self._introduce_once(metadata, key), context=Context())
            asking.add_done_callback(_note_end)
            await asyncio.shield(asking)
            if self.known(metadata) is None:
                raise StaleGrant(
                    "the grant names memory that is no longer registered",
                    peer=metadata.worker_id,
                    operation_id=metadata.operation_id,
                )
        return peer

    async def _introduce_once(self, metadata: RdmaMetadata, key: tuple[str, str]) -> None:
        try:
            await self._introduce(metadata, key)
        finally:
            del self._asking[key]  # here and not in a callback: who waits looks for it at once

    async def describe(self, metadata: RdmaMetadata) -> AgentDescription:
        """The peer's description of the granted memory alone, asked for anew: for another process of this worker.

        It is a capability: hand it over by a pipe, and keep it no longer than that. Raises as `ensure`.
        """
        description = await self._ask(metadata.worker_id, sorted({extent.region for extent in metadata.memory}))
        _check_epoch(description, metadata)
        return description

    async def _introduce(self, metadata: RdmaMetadata, key: tuple[str, str]) -> None:
        worker_id, epoch = key
        known = self._peers.get(key)
        unknown = sorted({extent.region for extent in metadata.memory} - set(known.regions)) if known else []
        self.num_handshakes += 1
        description = await self._ask(worker_id, unknown)
        _check_epoch(description, metadata)
        regions = {region.region: region for region in description.regions}
        if known is not None and not regions:
            return
        agent_name = await self._engine.call(lambda: self._engine.agent.load_peer(description.agent_metadata))
        if agent_name != description.agent_name:
            raise RemoteProtocolError("the peer's metadata names another agent than its description", peer=worker_id)
        if known is not None:
            known.regions.update(regions)
            while len(known.regions) > MAX_KNOWN_REGIONS:
                del known.regions[next(iter(known.regions))]  # the oldest; asked for again if it is named again
        else:
            self._peers[key] = Peer(
                worker_id, epoch, agent_name, regions, self._subjects.acks(worker_id).name.removesuffix("*")
            )

    async def _ask(self, worker_id: str, regions: Sequence[int]) -> AgentDescription:
        request = statements.question(self._keys, self._identity, self._process, worker_id, regions)
        reply = await self._caller.request(
            self._subjects.worker(worker_id, ENDPOINT),
            request,
            AgentMetadataReply,
            timeout_s=self._timeout_s,
            traced=False,
        )
        return statements.proved_description(self._keys, request, reply, worker_id)


def _note_end(asking: "asyncio.Task[None]") -> None:
    if not asking.cancelled():
        asking.exception()  # those who wait hear of it; perhaps nobody does any more


def _check_epoch(description: AgentDescription, metadata: RdmaMetadata) -> None:
    if (description.worker_id, description.epoch) != (metadata.worker_id, metadata.epoch):
        raise StaleGrant("the worker has restarted since it made the grant", peer=metadata.worker_id)
