"""The exchange of agent metadata between two workers: once per peer and epoch, authenticated, off the hot path.

In: a worker id and the epoch that its grant named. Out: a `Peer` that transfers can go to.
However many ask for one peer at once, one request is on the wire and all share its future; a failed one is forgotten,
so that the next request tries again. A peer is never removed: NIXL leaks a socket with each removal, on both sides.
A peer of another epoch than asked for is a `StaleGrant`: the epoch in the message refuses, not an event.
"""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from bus.control_plane.call import Caller
from bus.data_plane.agent import NixlAgent
from bus.data_plane.memory import RegisteredMemory
from bus.data_plane.transfer import TransferEngine
from bus.errors import RemoteProtocolError, StaleGrant
from bus.handshake.authentication import KeyRing
from schemas.codec import MessageError, decode, encode
from schemas.handshake import AgentDescription, AgentMetadataReply, AgentMetadataRequest, Region
from schemas.subjects import Subjects

ENDPOINT = "agent_metadata"


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker in one epoch whose agent ours can reach."""

    worker_id: str
    epoch: str
    agent_name: str
    regions: Mapping[int, Region]


class Introduction:
    """The answering half: tells who we are."""

    def __init__(self, worker_id: str, epoch: str, agent: NixlAgent, memory: RegisteredMemory, keys: KeyRing) -> None:
        self._worker_id = worker_id
        self._epoch = epoch
        self._agent = agent
        self._memory = memory
        self._keys = keys

    async def answer(self, request: AgentMetadataRequest) -> AgentMetadataReply:
        """Our description, signed for this request."""
        description = AgentDescription(
            worker_id=self._worker_id,
            epoch=self._epoch,
            agent_name=self._agent.name,
            agent_metadata=self._agent.metadata(),
            regions=list(self._memory.regions.values()),
        )
        return self._keys.sign(request, encode(description))


class Peers:
    """The asking half: the peers that this worker knows."""

    def __init__(
        self,
        worker_id: str,
        subjects: Subjects,
        caller: Caller,
        engine: TransferEngine,
        keys: KeyRing,
        timeout_s: float,
    ) -> None:
        self._worker_id = worker_id
        self._subjects = subjects
        self._caller = caller
        self._engine = engine
        self._keys = keys
        self._timeout_s = timeout_s
        self._peers: dict[tuple[str, str], asyncio.Task[Peer]] = {}
        self.num_handshakes = 0

    async def ensure(self, worker_id: str, epoch: str) -> Peer:
        """The peer, known to NIXL. Raises what the handshake failed with, to everybody who waited for it."""
        key = (worker_id, epoch)
        task = self._peers.get(key)
        if task is None:
            task = self._peers[key] = asyncio.create_task(self._introduce(worker_id, epoch))
            task.add_done_callback(lambda done: self._forget_failure(key, done))
        return await asyncio.shield(task)

    def known(self, worker_id: str, epoch: str) -> bool:
        """Whether `ensure` would return at once."""
        task = self._peers.get((worker_id, epoch))
        return task is not None and task.done()

    def _forget_failure(self, key: tuple[str, str], task: "asyncio.Task[Peer]") -> None:
        if task.cancelled() or task.exception() is not None:
            self._peers.pop(key, None)

    async def _introduce(self, worker_id: str, epoch: str) -> Peer:
        self.num_handshakes += 1
        request = AgentMetadataRequest(nonce=secrets.token_bytes(16), requester=self._worker_id)
        reply = await self._caller.request(
            self._subjects.worker(worker_id, ENDPOINT),
            request,
            AgentMetadataReply,
            timeout_s=self._timeout_s,
            traced=False,
        )
        description = _proved(self._keys, request, reply, worker_id)
        if (description.worker_id, description.epoch) != (worker_id, epoch):
            raise StaleGrant("the worker has restarted since it made the grant", peer=worker_id)
        agent_name = await self._engine.call(lambda: self._engine.agent.load_peer(description.agent_metadata))
        if agent_name != description.agent_name:
            raise RemoteProtocolError("the peer's metadata names another agent than its description", peer=worker_id)
        return Peer(worker_id, epoch, agent_name, {region.region: region for region in description.regions})


def _proved(
    keys: KeyRing, request: AgentMetadataRequest, reply: AgentMetadataReply, worker_id: str
) -> AgentDescription:
    try:
        return decode(keys.verify(request, reply, peer=worker_id), AgentDescription)
    except MessageError as error:
        raise RemoteProtocolError(f"the peer's description is malformed: {error}", peer=worker_id) from None
