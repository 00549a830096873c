import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from bus.data_plane.arena import ALIGNMENT_BYTES, Arena, ArenaSlice
from bus.errors import LocalProtocolError, PoolExhausted

CAPACITY = 16 * ALIGNMENT_BYTES


class ArenaMachine(RuleBasedStateMachine):
    """Any order of allocate, pin, unpin and free, against the rule that held memory is nobody else's."""

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(0, 1 << 20, CAPACITY)
        self.held: dict[ArenaSlice, int] = {}
        self.freed: set[ArenaSlice] = set()
        self.generations: set[int] = set()

    @rule(num_bytes=st.integers(1, CAPACITY))
    def allocate(self, num_bytes: int) -> None:
        try:
            taken = self.arena.allocate(num_bytes)
        except PoolExhausted:
            return
        assert taken.generation not in self.generations
        self.generations.add(taken.generation)
        self.held[taken] = 0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.held, key=lambda s: s.generation)))
        if chosen in self.freed:
            with pytest.raises(LocalProtocolError):
                chosen.pin()
        else:
            chosen.pin()
            self.held[chosen] += 1

    @precondition(lambda self: any(self.held.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        pinned = [s for s, pins in self.held.items() if pins]
        chosen = data.draw(st.sampled_from(sorted(pinned, key=lambda s: s.generation)))
        chosen.unpin()
        self.held[chosen] -= 1
        self.forget_if_gone(chosen)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(self.held, key=lambda s: s.generation)))
        chosen.free()
        self.freed.add(chosen)
        self.forget_if_gone(chosen)

    def forget_if_gone(self, chosen: ArenaSlice) -> None:
        if chosen in self.freed and not self.held[chosen]:
            del self.held[chosen]

    @invariant()
    def held_memory_overlaps_nothing_and_the_rest_is_free(self) -> None:
        ends = 0
        for taken in sorted(self.held, key=lambda s: s.offset_bytes):
            assert taken.offset_bytes % ALIGNMENT_BYTES == 0
            assert taken.offset_bytes >= ends
            ends = taken.offset_bytes + taken.num_bytes
        assert ends <= CAPACITY
        rounded = sum(-(-s.num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for s in self.held)
        assert self.arena.used_bytes == rounded

    def teardown(self) -> None:
        for taken, pins in list(self.held.items()):
            taken.free()
            for _ in range(pins):
                taken.unpin()
        assert self.arena.used_bytes == 0
        self.arena.allocate(CAPACITY)  # everything merged back into one piece


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_the_error_of_a_full_arena_tells_the_numbers() -> None:
    arena = Arena(0, 0, CAPACITY)
    arena.allocate(ALIGNMENT_BYTES)
    with pytest.raises(PoolExhausted, match=r"4,096 bytes free in one piece: 256 of 4,096 are in use"):
        arena.allocate(CAPACITY)


def test_nothing_and_less_can_not_be_allocated() -> None:
    with pytest.raises(LocalProtocolError):
        Arena(0, 0, CAPACITY).allocate(0)
