from hypothesis import given
from hypothesis import strategies as st

from bus.operations import lifecycle
from bus.operations.lifecycle import MEMORY_FREE, WAITING, GrantEvent, GrantState, event_of, next_state
from schemas.operations import AckOutcome

ACKS = {GrantEvent.ACK_COMPLETE, GrantEvent.ACK_FAILED}


@given(st.lists(st.sampled_from(GrantEvent), max_size=30))
def test_in_any_order_claimed_memory_is_free_only_after_an_ack(events: list[GrantEvent]) -> None:
    state, claimed, acked = GrantState.GRANTED, False, False
    for event in events:
        before, state = state, next_state(state, event)
        claimed = claimed or (before is GrantState.GRANTED and event is GrantEvent.CLAIM)
        acked = acked or (claimed and event in ACKS)
        if claimed and not acked:
            assert state not in MEMORY_FREE
        if before in MEMORY_FREE:
            assert state is before
        if state is GrantState.COMPLETE:
            assert claimed
            assert GrantEvent.ACK_COMPLETE in events


def test_no_state_both_waits_and_has_its_memory_free() -> None:
    assert not MEMORY_FREE & WAITING
    assert frozenset(GrantState) == MEMORY_FREE | WAITING | {GrantState.QUARANTINED}


def test_only_complete_proves_the_bytes() -> None:
    assert {outcome for outcome in AckOutcome if event_of(outcome) is GrantEvent.ACK_COMPLETE} == {AckOutcome.COMPLETE}


def test_the_picture_names_every_state() -> None:
    assert all(state.name in (lifecycle.__doc__ or "") for state in GrantState)
