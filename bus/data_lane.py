"""Everything that a bus holds of the data plane while it is open, wired together.

In: a configuration, a connection and the key. Out: `grants` (the passive side), `lanes` (the active one), the arena.
Opening makes the NIXL agent and registers the arena; `serve` begins to answer handshakes, claims, status queries, acks
and proofs of death. Closing cancels what waits, lets what was posted drain, and then says this worker's last word.
"""

import asyncio
import logging
from collections import OrderedDict
from contextvars import Context

from bus.config import BusConfig
from bus.control_plane.call import Caller
from bus.control_plane.connection import Connection, Msg
from bus.control_plane.peer_service import serve_peers, typed
from bus.data_plane.agent import NixlAgent
from bus.data_plane.memory import RegisteredMemory, TensorArena
from bus.data_plane.transfer_engine import TransferEngine
from bus.errors import AuthenticationError, BusError
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from bus.handshake.exchange import Introduction, Peers
from bus.handshake.process_identity import ProcessWatch
from bus.operations.claim import CLAIM_ENDPOINT, Lanes
from bus.operations.conclusions import Conclusions
from bus.operations.grants import Grants, QuarantineBound
from bus.operations.undertakings import Undertakings
from schemas.codec import MessageError, decode, encode
from schemas.operations import (
    ClaimRequest,
    CompletionAck,
    EpochDrained,
    Initiator,
    OperationStatusReply,
    OperationStatusRequest,
    ProcessIdentity,
    ProcessReaped,
)
from schemas.subjects import Subjects

STATUS_ENDPOINT = "operation_status"
DRAINED_EVENT, REAPED_EVENT = "drained", "reaped"
STATUS_TIMEOUT_S = 2.0
ACK_GRACE_S = 0.25
"""After an initiator's end: how long an ack that it sent before may still be on its way through NATS."""
MAX_MEMBERS = 65_536

_LOG = logging.getLogger(__name__)


class DataLane:
    """Made by `DataLane.open`."""

    def __init__(self, config: BusConfig, lanes: Lanes, arena: TensorArena, keys: KeyRing, watch: ProcessWatch) -> None:
        self.lanes = lanes
        self.arena = arena
        self.memory = lanes.memory
        self.engine = lanes.engine
        self.grants = Grants(
            lanes.identity,
            lanes.memory,
            QuarantineBound(config.quarantine_bytes or config.arena_bytes // 2, config.quarantine_operations),
            self._ask_initiator,
            lanes.conclusions,
            lanes.engine,
            keys,
        )
        lanes.engine.on_notification = self.grants.notified
        self._keys = keys
        self._watch = watch
        self._members: OrderedDict[Initiator, ProcessIdentity] = OrderedDict()
        self._introduction = Introduction(lanes.identity, lanes.engine.agent, lanes.memory, keys, self._on_member)
        self.answer_introduction = self._introduction.answer

    @classmethod
    async def open(
        cls, config: BusConfig, epoch: str, subjects: Subjects, connection: Connection, caller: Caller
    ) -> "DataLane":
        """Make the agent and the arena. Raises `KeyFileError`, `RegistrationError`."""
        keys = KeyRing.load(config.key_file)
        identity = Initiator(worker_id=config.worker_id, epoch=epoch)
        watch = ProcessWatch()
        agent = await asyncio.to_thread(NixlAgent, f"{config.worker_id}-{epoch}")
        memory = RegisteredMemory(agent, config.max_foreign_registrations)
        arena = memory.add_arena(config.arena_bytes)
        engine = TransferEngine(agent, chunk_bytes=config.chunk_bytes, inline_bytes=config.inline_bytes)
        peers = Peers(identity, watch.own, subjects, caller, engine, keys, config.handshake_timeout_s, memory.regions)
        lanes = Lanes(
            identity,
            subjects,
            connection,
            caller,
            peers,
            memory,
            engine,
            Undertakings(identity),
            Conclusions(),
            keys,
            asyncio.get_running_loop(),
        )
        return cls(config, lanes, arena, keys, watch)

    async def serve(self) -> None:
        """Subscribe."""
        lanes = self.lanes
        worker_id, subjects, connection = lanes.identity.worker_id, lanes.subjects, lanes.connection
        claims, queries = subjects.worker(worker_id, CLAIM_ENDPOINT), subjects.worker(worker_id, STATUS_ENDPOINT)
        await serve_peers(connection, worker_id, claims, ClaimRequest, self.grants.claim)
        await serve_peers(connection, worker_id, queries, OperationStatusRequest, self._answer_status)
        await connection.subscribe(subjects.acks(worker_id), self._on_ack)
        for drained in subjects.events(DRAINED_EVENT):
            await connection.subscribe(drained, typed(EpochDrained, self._on_drained))
        for reaped in subjects.events(REAPED_EVENT):
            await connection.subscribe(reaped, typed(ProcessReaped, self._on_reaped))

    def stats(self) -> dict[str, int]:
        """Counters; see `Bus.stats`."""
        lanes = self.lanes
        foreign = lanes.memory.foreign
        return {
            "arena_used_bytes": self.arena.arena.used_bytes,
            "arena_capacity_bytes": self.arena.arena.capacity_bytes,
            "registrations": lanes.memory.num_registrations,
            "registrations_foreign": foreign.num_cached,
            "deregistrations": foreign.num_deregistrations,
            "handshakes": lanes.peers.num_handshakes,
            "processes_watched": self._watch.num_watched,
            "grants_open": self.grants.num_open,
            "grants_quarantined": self.grants.num_quarantined,
            "quarantined_bytes": self.grants.quarantined_bytes,
            "acks_dropped": self.grants.num_dropped_acks,
            "acks_recovered": self.grants.num_recovered_acks,
            "operations_under_way": lanes.undertakings.num_open,
            "transfers_draining": lanes.engine.num_draining,
            "transfers_posted_inline": lanes.engine.num_posted_inline,
            "transfers_posted_by_thread": lanes.engine.num_posted_by_thread,
        }

    async def close(self, timeout_s: float) -> None:
        """Answer every waiter, let what was posted drain, and say so to those who may fence memory for us."""
        undertakings = self.lanes.undertakings
        self.grants.cancel_all()
        undertakings.close()
        await undertakings.idle(timeout_s)
        await self.lanes.conclusions.close(timeout_s)
        has_drained = await self.engine.close(timeout_s)
        await self.lanes.conclusions.close(timeout_s)  # what the last transfers left to conclude
        if has_drained and not undertakings.num_open:
            last_word = statements.epoch_drained(self._keys, self.lanes.identity)
            subject = self.lanes.subjects.event(self.lanes.identity.worker_id, DRAINED_EVENT)
            try:
                self.lanes.connection.publish_now(subject, encode(last_word))
            except BusError as error:
                _LOG.debug("the last word could not be sent: %s", error)
        self._watch.close()

    def _answer_status(self, request: OperationStatusRequest) -> OperationStatusReply:
        statements.check_status_request(self._keys, request)
        return statements.status_reply(self._keys, request, self.lanes.undertakings.answer(request))

    async def _ask_initiator(self, request: OperationStatusRequest) -> OperationStatusReply | None:
        subject = self.lanes.subjects.worker(request.initiator.worker_id, STATUS_ENDPOINT)
        try:
            return await self.lanes.caller.ask_peer(subject, request, OperationStatusReply, timeout_s=STATUS_TIMEOUT_S)
        except BusError as error:
            _LOG.debug("%s did not say what became of %s: %s", subject, request.operation_id, error)
            return None

    def _on_ack(self, message: Msg) -> None:
        try:
            ack = decode(message.data, CompletionAck)
        except MessageError as error:
            self.grants.num_dropped_acks += 1
            _LOG.warning("what came on %s is no ack: %s", message.subject, error)
            return
        self.grants.acknowledge(ack, message.headers)

    def _on_member(self, member: Initiator, process: ProcessIdentity) -> None:
        if member in self._members:
            return
        self._members[member] = process
        if len(self._members) > MAX_MEMBERS:
            self._members.popitem(last=False)
        self._watch.when_gone(process, lambda: self._end(member))

    def _on_drained(self, message: EpochDrained) -> None:
        try:
            self._end(statements.check_epoch_drained(self._keys, message))
        except AuthenticationError as error:
            _LOG.warning("a last word was not believed: %s", error)

    def _on_reaped(self, message: ProcessReaped) -> None:
        try:
            statements.check_process_reaped(self._keys, message)
        except AuthenticationError as error:
            _LOG.warning("a supervisor's report was not believed: %s", error)
            return
        for member, process in list(self._members.items()):
            if (member.worker_id, process) == (message.worker_id, message.process):
                self._end(member)

    def _end(self, member: Initiator) -> None:
        self._members.pop(member, None)
        self.lanes.loop.call_later(ACK_GRACE_S, self.grants.initiator_gone, member, context=Context())
