"""The two halves of the protocol against each other, over a network that reorders, repeats and loses everything.

The real tables of both sides, a real arena, no transport: what is left of NIXL is whether an initiator may still write.
"""

import asyncio
from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus.data_plane.addressing import contiguous_extent
from bus.data_plane.arena import Arena
from bus.data_plane.memory import LocalMemory
from bus.deadline import Deadline
from bus.errors import BusError, PeerLost, StaleGrant
from bus.handshake import statements
from bus.handshake.authentication import KeyRing
from bus.operations.conclusions import Conclusions
from bus.operations.grants import Grants, GrantTerms, QuarantineBound
from bus.operations.lifecycle import MEMORY_FREE, InitiatorEvent, InitiatorState
from bus.operations.target import PassiveOperation
from bus.operations.undertakings import Undertaking, Undertakings
from schemas.operations import (
    AckOutcome,
    ClaimReply,
    ClaimRequest,
    CompletionAck,
    Initiator,
    OperationKind,
    OperationState,
    OperationStatusReply,
    OperationStatusRequest,
    RdmaMetadata,
)

KEYS = KeyRing((("id", b"k" * 32),))
TARGET = Initiator(worker_id="target", epoch="e0")
NUM_BYTES = 64


class Held:
    """Stands for the registered memory: what is handed over is a slice of the arena already."""

    def hold(self, memory: LocalMemory) -> LocalMemory:
        memory.lease.pin()
        return memory


class Peer:
    """An initiator: its table, and for each operation whether its NIXL may still write."""

    def __init__(self, name: str) -> None:
        self.identity = Initiator(worker_id=name, epoch="e1")
        self.table = Undertakings(self.identity)
        self.is_alive = True
        self.tokens: dict[str, bytes] = {}
        self.held: dict[str, Undertaking] = {}
        self.in_nixl: set[str] = set()
        """Posted, and not ended: NIXL writes, whatever the table says."""
        self.done: set[str] = set()

    def may_touch(self, operation_id: str) -> bool:
        """With the token in hand it may post at any moment; without, it can't."""
        undertaking = self.held.get(operation_id)
        may_post = undertaking is not None and undertaking.state is InitiatorState.HELD and operation_id in self.tokens
        return self.is_alive and (may_post or operation_id in self.in_nixl)


class ProtocolMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.arena = Arena(0, 4096, 1 << 20)
        self.peers = [Peer("p0"), Peer("p1")]
        self.wire: list[tuple[str, Any, Peer]] = []
        self.operations: list[PassiveOperation] = []
        self.answers: dict[str, list[str]] = {}

        async def no_answer(request: OperationStatusRequest) -> OperationStatusReply | None:
            return None  # queries travel over `wire` instead

        unused: Any = None  # no invitations here
        memory: Any = Held()

        async def make() -> Grants:
            bound = QuarantineBound(1 << 30, 1 << 30)
            return Grants(TARGET, memory, bound, no_answer, Conclusions(), unused, KEYS)

        self.grants = self.loop.run_until_complete(make())

    def teardown(self) -> None:
        for operation in self.operations:
            operation._timer.cancel()
        self.settle()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        self.settle()
        self.loop.close()

    def settle(self) -> None:
        for _ in range(4):
            self.loop.run_until_complete(asyncio.sleep(0))

    def within(self, function: Callable[[], Any]) -> None:
        async def call() -> None:
            function()

        self.loop.run_until_complete(call())
        self.settle()

    @precondition(lambda self: len(self.operations) < 2)
    @rule(named=st.booleans(), readable=st.booleans(), max_claims=st.integers(1, 2))
    def grant(self, named: bool, readable: bool, max_claims: int) -> None:
        kind = OperationKind.READABLE if readable else OperationKind.WRITABLE
        if named or not readable:
            max_claims = 1
        piece = self.arena.allocate(NUM_BYTES)
        extent = contiguous_extent(0, piece.generation, piece.offset_bytes, NUM_BYTES)
        memory = LocalMemory([extent], NUM_BYTES, piece)
        initiator = self.peers[0].identity if named else None
        terms = GrantTerms(kind, Deadline.after(1000), "t", initiator, max_claims)
        try:
            operation = self.loop.run_until_complete(self.grants.create(memory, terms))
        except PeerLost:
            assert not self.peers[0].is_alive
            piece.free()
            return
        piece.free()  # its holder is done at once: from here the pins alone keep it
        self.operations.append(operation)
        self.wire.extend(("grant", operation.metadata, peer) for peer in self.peers)
        answers = self.answers[operation.metadata.operation_id] = []

        async def wait() -> None:
            try:
                await operation
                answers.append("complete")
            except BusError as error:
                answers.append(type(error).__name__)

        self.loop.create_task(wait())
        self.settle()

    @precondition(lambda self: self.wire)
    @rule(data=st.data(), fate=st.sampled_from(["deliver"] * 6 + ["repeat", "lose"]))
    def network(self, data: st.DataObject, fate: str) -> None:
        index = data.draw(st.integers(0, len(self.wire) - 1))
        kind, message, peer = self.wire[index] if fate == "repeat" else self.wire.pop(index)
        if fate != "lose":
            self.within(lambda: getattr(self, f"on_{kind}")(message, peer))

    def on_grant(self, metadata: RdmaMetadata, peer: Peer) -> None:
        if not peer.is_alive or metadata.initiator not in (None, peer.identity):
            return
        try:
            peer.held[metadata.operation_id] = peer.table.begin(metadata)
        except StaleGrant:
            return
        if metadata.token is not None:
            peer.tokens[metadata.operation_id] = metadata.token
            return
        request = statements.claim_request(KEYS, metadata, peer.identity)
        self.wire.append(("claim", request, peer))

    def on_claim(self, request: ClaimRequest, peer: Peer) -> None:
        try:
            self.wire.append(("claimed", self.grants.claim(request), peer))
        except StaleGrant:
            self.wire.append(("refused", request.operation_id, peer))

    def on_claimed(self, reply: ClaimReply, peer: Peer) -> None:
        undertaking = peer.held[reply.operation_id]
        if peer.is_alive and undertaking.state is InitiatorState.HELD:
            tokens = statements.claim_tokens(KEYS, reply.operation_id, "e0", peer.identity)
            peer.tokens[reply.operation_id] = tokens[0]

    def on_refused(self, operation_id: str, peer: Peer) -> None:
        if peer.is_alive and operation_id not in peer.tokens:
            peer.held[operation_id].move(InitiatorEvent.CANCEL)

    def on_ack(self, ack: CompletionAck, peer: Peer) -> None:
        self.grants.acknowledge(ack)

    def on_query(self, request: OperationStatusRequest, peer: Peer) -> None:
        if peer.is_alive:
            self.wire.append(("status", peer.table.answer(request), peer))

    def on_status(self, reply: OperationStatusReply, peer: Peer) -> None:
        operation = self.grants._operations.get(reply.operation_id)
        if operation is None or reply.initiator != peer.identity:
            return
        if reply.state is OperationState.REFUSED:
            operation.revoke(reply.initiator)
        elif reply.ack is not None:
            operation.acknowledge(reply.ack, None)

    def under_way(self) -> list[tuple[Peer, str]]:
        return [(peer, number) for peer in self.peers for number in peer.held if peer.may_touch(number)]

    @precondition(lambda self: self.under_way())
    @rule(data=st.data(), event=st.sampled_from(["post", "done", "error", "cancel"]))
    def initiator_acts(self, data: st.DataObject, event: str) -> None:
        peer, number = data.draw(st.sampled_from(self.under_way()))
        undertaking = peer.held[number]
        if event == "post":
            undertaking.move(InitiatorEvent.POST)
            peer.in_nixl.add(number)
        elif event == "cancel":
            before = undertaking.state
            undertaking.move(InitiatorEvent.CANCEL)
            if before is InitiatorState.HELD:
                self.send_ack(peer, number, AckOutcome.NEVER_POSTED)
        elif number in peer.in_nixl:
            complete = event == "done" and undertaking.state is InitiatorState.POSTED
            peer.in_nixl.discard(number)
            if complete:
                peer.done.add(number)
            undertaking.move(InitiatorEvent.END)
            self.send_ack(peer, number, AckOutcome.COMPLETE if complete else AckOutcome.FAILED)

    def send_ack(self, peer: Peer, number: str, outcome: AckOutcome) -> None:
        ack = CompletionAck(
            operation_id=number,
            outcome=outcome,
            initiator=peer.identity,
            token=peer.tokens[number],
            num_bytes=NUM_BYTES,
        )
        peer.held[number].ack = ack
        self.wire.append(("ack", ack, peer))

    @precondition(lambda self: self.grants.num_open)
    @rule(data=st.data(), event=st.sampled_from(["cancel", "lease end", "ask", "ask"]))
    def target_acts(self, data: st.DataObject, event: str) -> None:
        operation = data.draw(st.sampled_from(list(self.grants._operations.values())))
        if event == "cancel":
            self.within(operation.cancel)
        elif event == "lease end":
            operation.deadline = Deadline(0.0)
            operation._timer.cancel()
            self.within(operation._on_timer)
            operation._timer.cancel()
        else:
            for seat in operation._seats:
                if seat.initiator is not None:
                    peer = next(peer for peer in self.peers if peer.identity == seat.initiator)
                    query = OperationStatusRequest(
                        operation_id=operation.metadata.operation_id,
                        worker_id="target",
                        epoch="e0",
                        initiator=seat.initiator,
                        serial=operation.metadata.serial,
                    )
                    self.wire.append(("query", query, peer))

    @precondition(lambda self: self.operations)
    @rule(index=st.integers(0, 1), chance=st.integers(0, 7))
    def peer_dies(self, index: int, chance: int) -> None:
        if chance:
            return
        peer = self.peers[index]
        peer.is_alive = False
        self.within(lambda: self.grants.initiator_gone(peer.identity))

    @invariant()
    def memory_that_somebody_may_write_is_never_free(self) -> None:
        holes = self.arena._free
        for operation in self.operations:
            number = operation.metadata.operation_id
            if any(peer.may_touch(number) for peer in self.peers):
                start = operation.metadata.memory[0].runs[0].offset_bytes
                assert not any(offset <= start < offset + length for offset, length in holes)

    @invariant()
    def a_waiter_is_answered_once_and_complete_only_if_it_is(self) -> None:
        for operation in self.operations:
            number = operation.metadata.operation_id
            answers = self.answers[number]
            assert len(answers) <= 1
            if answers == ["complete"]:
                finished = sum(number in peer.done for peer in self.peers)
                assert finished >= operation.metadata.max_claims

    @invariant()
    def what_ended_everywhere_is_forgotten(self) -> None:
        open_operations = set(self.grants._operations)
        for operation in self.operations:
            is_free = all(seat.state in MEMORY_FREE for seat in operation._seats)
            assert is_free is (operation.metadata.operation_id not in open_operations)
        fenced = sum(operation._is_quarantined for operation in self.operations)
        assert self.grants.num_quarantined == fenced


TestProtocolInAnyOrder = ProtocolMachine.TestCase
TestProtocolInAnyOrder.settings = settings(max_examples=700, stateful_step_count=50, deadline=None)
