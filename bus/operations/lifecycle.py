"""The two halves of an operation's life, as literal tables without I/O: a claim at its target, and the same operation
at its initiator.

In: a state and an event. Out: the next state. Events may come in any order and twice; what a state has no row for
leaves it as it is.

At the target each of a grant's `max_claims` claims has a life of its own. The waiter is answered once, when none of
them is GRANTED or CLAIMED any more. The memory may be used again only when all are in a state of `MEMORY_FREE`: an
initiator that holds a claim may write until its own word, or a proof of its death, ends it, whatever the waiter has
been told; so a claim that is cancelled or overdue waits in QUARANTINED. Silence is no event.

    GRANTED ──claim──▶ CLAIMED ──ack──▶ COMPLETE | FAILED ◀──initiator gone── CLAIMED
       │                  └──cancel, lease──▶ QUARANTINED ──ack, initiator gone──▶ RELEASED
       └──cancel, lease──▶ REVOKED

At the initiator a status query of an operation that it has not seen is a refusal for ever: the query may have
overtaken the grant.

    UNSEEN ──begin──▶ HELD ──post──▶ POSTED ──done, error──▶ CONCLUDED
       │               └──cancel──▶ CONCLUDED    └──cancel──▶ DRAINING ──done, error──▶ CONCLUDED
       └──query──▶ REFUSED
"""

from enum import Enum
from types import MappingProxyType

from schemas.operations import AckOutcome


class GrantState(Enum):
    """Where a claim is, at the target."""

    GRANTED = "granted"
    CLAIMED = "claimed"
    COMPLETE = "complete"
    FAILED = "failed"
    REVOKED = "revoked"
    QUARANTINED = "quarantined"
    RELEASED = "released"
    __hash__ = object.__hash__  # members are single objects; Enum would hash their names, in Python


class GrantEvent(Enum):
    """What can happen to it."""

    CLAIM = "claim"
    ACK_COMPLETE = "ack complete"
    ACK_FAILED = "ack failed"
    INITIATOR_GONE = "initiator gone"
    CANCEL = "cancel"
    LEASE_END = "lease end"
    __hash__ = object.__hash__  # members are single objects; Enum would hash their names, in Python


_AT_TARGET = MappingProxyType(
    {
        (GrantState.GRANTED, GrantEvent.CLAIM): GrantState.CLAIMED,
        (GrantState.GRANTED, GrantEvent.CANCEL): GrantState.REVOKED,
        (GrantState.GRANTED, GrantEvent.LEASE_END): GrantState.REVOKED,
        (GrantState.CLAIMED, GrantEvent.ACK_COMPLETE): GrantState.COMPLETE,
        (GrantState.CLAIMED, GrantEvent.ACK_FAILED): GrantState.FAILED,
        (GrantState.CLAIMED, GrantEvent.INITIATOR_GONE): GrantState.FAILED,
        (GrantState.CLAIMED, GrantEvent.CANCEL): GrantState.QUARANTINED,
        (GrantState.CLAIMED, GrantEvent.LEASE_END): GrantState.QUARANTINED,
        (GrantState.QUARANTINED, GrantEvent.ACK_COMPLETE): GrantState.RELEASED,
        (GrantState.QUARANTINED, GrantEvent.ACK_FAILED): GrantState.RELEASED,
        (GrantState.QUARANTINED, GrantEvent.INITIATOR_GONE): GrantState.RELEASED,
    }
)

MEMORY_FREE = frozenset({GrantState.COMPLETE, GrantState.FAILED, GrantState.REVOKED, GrantState.RELEASED})
"""States in which that initiator may not touch the memory any more."""

WAITING = frozenset({GrantState.GRANTED, GrantState.CLAIMED})
"""States in which the waiter has no answer yet."""


class InitiatorState(Enum):
    """Where an operation is, at its initiator."""

    UNSEEN = "unseen"
    HELD = "held"
    POSTED = "posted"
    DRAINING = "draining"
    CONCLUDED = "concluded"
    REFUSED = "refused"
    __hash__ = object.__hash__  # members are single objects; Enum would hash their names, in Python


class InitiatorEvent(Enum):
    """What can happen to it."""

    BEGIN = "begin"
    POST = "post"
    END = "done or error"
    CANCEL = "cancel"
    QUERY = "query"
    __hash__ = object.__hash__  # members are single objects; Enum would hash their names, in Python


_AT_INITIATOR = MappingProxyType(
    {
        (InitiatorState.UNSEEN, InitiatorEvent.BEGIN): InitiatorState.HELD,
        (InitiatorState.UNSEEN, InitiatorEvent.QUERY): InitiatorState.REFUSED,
        (InitiatorState.HELD, InitiatorEvent.POST): InitiatorState.POSTED,
        (InitiatorState.HELD, InitiatorEvent.CANCEL): InitiatorState.CONCLUDED,
        (InitiatorState.POSTED, InitiatorEvent.END): InitiatorState.CONCLUDED,
        (InitiatorState.POSTED, InitiatorEvent.CANCEL): InitiatorState.DRAINING,
        (InitiatorState.DRAINING, InitiatorEvent.END): InitiatorState.CONCLUDED,
    }
)

MAY_TOUCH = frozenset({InitiatorState.HELD, InitiatorState.POSTED, InitiatorState.DRAINING})
"""States in which an initiator may still touch the target's memory."""


def next_state(state: GrantState, event: GrantEvent) -> GrantState:
    """The target's state after `event`; the same one where the table has no row."""
    return _AT_TARGET.get((state, event), state)


def next_initiator_state(state: InitiatorState, event: InitiatorEvent) -> InitiatorState:
    """The initiator's state after `event`; the same one where the table has no row."""
    return _AT_INITIATOR.get((state, event), state)


def event_of(outcome: AckOutcome) -> GrantEvent:
    """What an ack means for the grant: everything but `complete` leaves bytes that were not proved."""
    return GrantEvent.ACK_COMPLETE if outcome is AckOutcome.COMPLETE else GrantEvent.ACK_FAILED
