"""When a refused request is sent again, and after how long: a policy, without I/O.

In: the error of an attempt, how many there were. Out: the pause before the next, or that there is none.
Only a refusal that says so is retried: the request was not taken, so that no work is done twice. A caller that knows
its request to be harmless to repeat says so with `idempotent`, and is retried after a lost connection too.
Source of the backoff: "full jitter" (AWS Architecture Blog, Exponential Backoff and Jitter).
"""

import random
from dataclasses import dataclass

from bus.errors import BusError, ConnectionLost, NoResponders, PeerLost, RemoteFault
from schemas.fault import FaultCode

NOT_TAKEN = frozenset({FaultCode.OVERLOADED, FaultCode.DRAINING, FaultCode.POOL_EXHAUSTED})
"""Refusals after which nothing was done, where the worker that was asked speaks for itself and its handler had not
begun: a fault that comes from further down tells that the hops before it have. A handler that refuses before it does
anything raises `RequestRefused` with one of these, or `Overloaded`."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is repeated. `attempts` counts the first."""

    attempts: int = 3
    first_pause_s: float = 0.02
    max_pause_s: float = 1.0
    idempotent: bool = False
    """Whether the request may be carried out twice: then every error that calls itself retryable is retried."""

    def pause_s(self, error: BusError, attempt: int, remaining_s: float, *, elsewhere: bool = False) -> float | None:
        """Seconds to wait after the failed `attempt` (from 1), or None to raise `error`.

        `elsewhere`: the next attempt avoids who refused, so that the time after which to come back isn't waited for.
        """
        if attempt >= self.attempts or not self._may_repeat(error):
            return None
        longest_s = min(self.first_pause_s * 2 ** (attempt - 1), self.max_pause_s)
        pause_s = random.uniform(0, longest_s) + (0.0 if elsewhere else retry_after_s(error))  # noqa: S311
        return pause_s if pause_s < remaining_s else None

    def _may_repeat(self, error: BusError) -> bool:
        if isinstance(error, RemoteFault):
            was_taken = error.fault.begun or bool(error.fault.hops) or error.fault.code not in NOT_TAKEN
            return error.fault.retryable and (self.idempotent or not was_taken)
        return isinstance(error, NoResponders) or (self.idempotent and isinstance(error, (ConnectionLost, PeerLost)))


ONCE = RetryPolicy(attempts=1)
THRICE = RetryPolicy()


def retry_after_s(error: BusError) -> float:
    """What the refusing worker asked for."""
    return error.fault.retry_after_ms / 1e3 if isinstance(error, RemoteFault) else 0.0
