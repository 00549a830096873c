"""What is done to which message: rules by subject, and what becomes of a message that meets them.

In: rules, and publications in the order in which they come, each in a `Parcel` that says whose it is. Out: parcels to
be forwarded, now or later.
Invariants: the first rule, in the order of their making, that matches and isn't spent takes a message; a message that
no rule takes is forwarded at once; whatever a reordering rule holds comes out exactly once.
Leaves out: time and I/O (`fault_proxy`). May be called from any thread.
"""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum


class Fault(Enum):
    """What a rule does."""

    DROP = "drop"
    DELAY = "delay"
    DUPLICATE = "duplicate"
    REORDER = "reorder"


@dataclass(frozen=True, slots=True, eq=False)
class Parcel:
    """One message on its way: `way` is the connection that it came over, `raw` what is to be written there."""

    way: object
    raw: bytes


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to forward, in order, after `after_s`; and the rule that now holds the parcel back, to be let go in time."""

    forward: tuple[Parcel, ...] = ()
    after_s: float = 0.0
    held_by: "FaultRule | None" = None


@dataclass(eq=False)
class FaultRule:
    """One fault for one pattern of subjects; made by the proxy's `drop`, `delay`, `duplicate` and `reorder`."""

    fault: Fault
    pattern: str
    count: int | None
    """Messages that it takes before it is spent; None: all."""
    seconds: float = 0.0
    """How late a delayed message is; how long a reordered one waits for the others."""
    hits: int = 0
    """Messages that it has taken so far."""
    _is_spent: bool = False
    _held: list[Parcel] = field(default_factory=list)
    _remove: "Callable[[FaultRule], None]" = lambda rule: None

    def remove(self) -> None:
        """Take no more messages. What is held back goes on at once; a delayed message stays late."""
        self._remove(self)

    async def wait_for_hits(self, count: int = 1, *, timeout_s: float = 5.0) -> None:
        """Wait until it has taken `count` messages. Raises `TimeoutError` that says how many it took."""
        deadline_s = time.monotonic() + timeout_s
        while self.hits < count:
            if time.monotonic() > deadline_s:
                raise TimeoutError(
                    f"{self.fault.value} {self.pattern!r} took {self.hits} of {count} messages in {timeout_s:g} s"
                )
            await asyncio.sleep(0.002)

    def _takes(self, subject: str) -> bool:
        return not self._is_spent and subject_matches(self.pattern, subject)

    def _take(self, parcel: Parcel) -> Verdict:
        self.hits += 1
        self._is_spent = self.hits == self.count
        if self.fault is Fault.DROP:
            return Verdict()
        if self.fault is Fault.DELAY:
            return Verdict((parcel,), after_s=self.seconds)
        if self.fault is Fault.DUPLICATE:
            return Verdict((parcel, parcel))
        self._held.append(parcel)
        if self._is_spent:
            return Verdict(tuple(reversed(self._let_go())))
        return Verdict(held_by=self)

    def _let_go(self) -> list[Parcel]:
        held, self._held = self._held, []
        return held


class FaultRules:
    """The rules that are in force."""

    def __init__(self) -> None:
        self._rules: list[FaultRule] = []
        self._lock = threading.Lock()

    def add(self, rule: FaultRule) -> None:
        """Put a rule behind the others. Raises `ValueError` for a pattern, count or time that can't be meant."""
        _check(rule)
        with self._lock:
            self._rules.append(rule)

    def decide(self, subject: str, parcel: Parcel) -> Verdict:
        """What becomes of one message."""
        with self._lock:
            for rule in self._rules:
                if rule._takes(subject):
                    return rule._take(parcel)
        return Verdict((parcel,))

    def let_go(self, rule: FaultRule) -> list[Parcel]:
        """What `rule` holds back, in the order in which it came; it is spent then."""
        with self._lock:
            rule._is_spent |= bool(rule._held)
            return rule._let_go()

    def remove(self, *rules: FaultRule) -> list[Parcel]:
        """Take rules out, all of them if none is named; returns what they held."""
        with self._lock:
            going = list(rules) or self._rules
            self._rules = [rule for rule in self._rules if rule not in going]
            return [parcel for rule in going for parcel in rule._let_go()]


def subject_matches(pattern: str, subject: str) -> bool:
    """Whether a subject is one of a pattern's, as NATS has it: `*` is any one token, a last `>` one or more."""
    wanted, given = pattern.split("."), subject.split(".")
    if wanted[-1] == ">" and len(given) >= len(wanted):
        wanted.pop()
        given = given[: len(wanted)]
    return len(wanted) == len(given) and all(want in ("*", token) for want, token in zip(wanted, given, strict=True))


def _check(rule: FaultRule) -> None:
    tokens = rule.pattern.split(".")
    if not all(tokens) or any(character.isspace() for character in rule.pattern) or ">" in tokens[:-1]:
        raise ValueError(f"{rule.pattern!r} is no pattern of subjects; write tokens with dots, '*' for one, '>' last")
    least = 2 if rule.fault is Fault.REORDER else 1
    if rule.count is not None and rule.count < least:
        raise ValueError(f"count={rule.count} of a {rule.fault.value} rule is below {least}")
    if rule.seconds < 0:
        raise ValueError(f"{rule.seconds:g} s is no time to wait")
