from hypothesis import given
from hypothesis import strategies as st

from bus.operations import lifecycle
from bus.operations.lifecycle import (
    MAY_TOUCH,
    MEMORY_FREE,
    WAITING,
    GrantEvent,
    GrantState,
    InitiatorEvent,
    InitiatorState,
    event_of,
    next_initiator_state,
    next_state,
)
from schemas.operations import AckOutcome

ENDS = {GrantEvent.ACK_COMPLETE, GrantEvent.ACK_FAILED, GrantEvent.INITIATOR_GONE}


@given(st.lists(st.sampled_from(GrantEvent), max_size=30))
def test_in_any_order_claimed_memory_is_free_only_after_the_initiator_s_word_or_end(events: list[GrantEvent]) -> None:
    state, claimed, ended = GrantState.GRANTED, False, False
    for event in events:
        before, state = state, next_state(state, event)
        claimed = claimed or (before is GrantState.GRANTED and event is GrantEvent.CLAIM)
        ended = ended or (claimed and event in ENDS)
        if claimed and not ended:
            assert state not in MEMORY_FREE
        if before in MEMORY_FREE:
            assert state is before
        if state is GrantState.COMPLETE:
            assert claimed
            assert GrantEvent.ACK_COMPLETE in events


@given(st.lists(st.sampled_from(InitiatorEvent), max_size=30))
def test_in_any_order_an_initiator_that_was_asked_first_never_touches_the_memory(events: list[InitiatorEvent]) -> None:
    state = InitiatorState.UNSEEN
    for event in events:
        before, state = state, next_initiator_state(state, event)
        if before in (InitiatorState.REFUSED, InitiatorState.CONCLUDED):
            assert state is before
        if before is InitiatorState.POSTED and event is not InitiatorEvent.END:
            assert state in MAY_TOUCH  # only NIXL's end ends what was posted


def test_no_state_both_waits_and_has_its_memory_free() -> None:
    assert not MEMORY_FREE & WAITING
    assert frozenset(GrantState) == MEMORY_FREE | WAITING | {GrantState.QUARANTINED}


def test_only_complete_proves_the_bytes() -> None:
    assert {outcome for outcome in AckOutcome if event_of(outcome) is GrantEvent.ACK_COMPLETE} == {AckOutcome.COMPLETE}


def test_the_pictures_name_every_state() -> None:
    picture = lifecycle.__doc__ or ""
    assert all(state.name in picture for state in (*GrantState, *InitiatorState))
