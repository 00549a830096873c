"""A point in this process's monotonic time, and the one that the current task works under.

In: a duration (a TTL header, a caller's timeout). Out: what remains of it. Between hosts only durations travel.
An endpoint sets the deadline of the request it serves; every call made for that request is cut to what remains.
"""

import contextlib
import time
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple


class Deadline(NamedTuple):
    """When to stop waiting, on the clock of `time.monotonic`, in seconds."""

    at_s: float

    @classmethod
    def after(cls, duration_s: float) -> "Deadline":
        """The deadline `duration_s` from now, or the current task's, whichever is sooner."""
        return cls.at(time.monotonic() + duration_s)

    @classmethod
    def at(cls, at_s: float) -> "Deadline":
        """The deadline at a time of `time.monotonic`, or the current task's, whichever is sooner."""
        own = cls(at_s)
        outer = _current.get()
        return outer if outer is not None and outer.at_s < own.at_s else own

    @property
    def remaining_s(self) -> float:
        """Seconds left; negative when it has passed."""
        return self.at_s - time.monotonic()

    @property
    def remaining_ms(self) -> int:
        """Whole milliseconds left, never below 0."""
        return max(0, int(self.remaining_s * 1000))

    @property
    def expired(self) -> bool:
        """Whether it has passed."""
        return self.remaining_s <= 0


_current: ContextVar[Deadline | None] = ContextVar("nixlbus_deadline", default=None)


def work_under(deadline: Deadline) -> None:
    """Make `deadline` the current task's, until its end."""
    _current.set(deadline)


@contextlib.contextmanager
def working_under(deadline: Deadline) -> Iterator[Deadline]:
    """Make `deadline` the current task's, for calls that it makes."""
    token = _current.set(deadline)
    try:
        yield deadline
    finally:
        _current.reset(token)
