"""The life of a grant at its target: a literal table, no I/O.

In: a state and an event. Out: the next state. Events may come in any order and twice; what a state has no row for
leaves it as it is. The waiter is answered once, on leaving GRANTED or CLAIMED. The memory may be used again only in a
state of `MEMORY_FREE`: an initiator that holds a claim may write until its own ack ends it, whatever the waiter has
been told, so a claimed grant that is cancelled or overdue waits in QUARANTINED.

    GRANTED ──claim──▶ CLAIMED ──ack──▶ COMPLETE | FAILED
       │                  └──cancel, lease──▶ QUARANTINED ──ack──▶ RELEASED
       └──cancel, lease──▶ REVOKED
"""

from enum import Enum
from types import MappingProxyType

from schemas.operations import AckOutcome


class GrantState(Enum):
    """Where a grant is."""

    GRANTED = "granted"
    CLAIMED = "claimed"
    COMPLETE = "complete"
    FAILED = "failed"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    RELEASED = "released"


class GrantEvent(Enum):
    """What can happen to it."""

    CLAIM = "claim"
    ACK_COMPLETE = "ack complete"
    ACK_FAILED = "ack failed"
    CANCEL = "cancel"
    LEASE_END = "lease end"


_TABLE = MappingProxyType(
    {
        (GrantState.GRANTED, GrantEvent.CLAIM): GrantState.CLAIMED,
        (GrantState.GRANTED, GrantEvent.CANCEL): GrantState.REVOKED,
        (GrantState.GRANTED, GrantEvent.LEASE_END): GrantState.REVOKED,
        (GrantState.CLAIMED, GrantEvent.ACK_COMPLETE): GrantState.COMPLETE,
        (GrantState.CLAIMED, GrantEvent.ACK_FAILED): GrantState.FAILED,
        (GrantState.CLAIMED, GrantEvent.CANCEL): GrantState.QUARANTINED,
        (GrantState.CLAIMED, GrantEvent.LEASE_END): GrantState.QUARANTINED,
        (GrantState.QUARANTINED, GrantEvent.ACK_COMPLETE): GrantState.RELEASED,
        (GrantState.QUARANTINED, GrantEvent.ACK_FAILED): GrantState.RELEASED,
    }
)

MEMORY_FREE = frozenset({GrantState.COMPLETE, GrantState.FAILED, GrantState.REVOKED, GrantState.RELEASED})
"""States in which nobody else may touch the memory any more."""

WAITING = frozenset({GrantState.GRANTED, GrantState.CLAIMED})
"""States in which the waiter has no answer yet."""


def next_state(state: GrantState, event: GrantEvent) -> GrantState:
    """The state after `event`; the same one where the table has no row."""
    return _TABLE.get((state, event), state)


def event_of(outcome: AckOutcome) -> GrantEvent:
    """What an ack means for the grant: everything but `complete` leaves bytes that were not proved."""
    return GrantEvent.ACK_COMPLETE if outcome is AckOutcome.COMPLETE else GrantEvent.ACK_FAILED
