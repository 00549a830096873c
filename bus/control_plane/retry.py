"""When a refused request is sent again, and after how long: a policy, without I/O.

In: the error of an attempt, how many there were. Out: the pause before the next, or that there is none.
Only a refusal that says so is retried: the request was not taken, so that no work is done twice. A caller that knows
its request to be harmless to repeat says so with `idempotent`, and is retried after a lost connection too.
Source of the backoff: "full jitter" (AWS Architecture Blog, Exponential Backoff and Jitter).
"""

import random
from dataclasses import dataclass

from bus.errors import BusError, ConnectionLost, NoResponders, RemoteFault
from schemas.fault import FaultCode

NOT_TAKEN = frozenset({FaultCode.OVERLOADED, FaultCode.DRAINING, FaultCode.NO_RESPONDERS, FaultCode.POOL_EXHAUSTED})
"""Refusals after which nothing was done."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How a call is repeated. `attempts` counts the first."""

    attempts: int = 3
    first_pause_s: float = 0.02
    max_pause_s: float = 1.0
    idempotent: bool = False
    """Whether the request may be carried out twice: then every error that calls itself retryable is retried."""

    def pause_s(self, error: BusError, attempt: int, remaining_s: float) -> float | None:
        """Seconds to wait after the failed `attempt` (from 1), or None to raise `error`."""
        if attempt >= self.attempts or not self._may_repeat(error):
            return None
        longest_s = min(self.first_pause_s * 2 ** (attempt - 1), self.max_pause_s)
        pause_s = max(random.uniform(0, longest_s), retry_after_s(error))  # noqa: S311
        return pause_s if pause_s < remaining_s else None

    def _may_repeat(self, error: BusError) -> bool:
        if isinstance(error, RemoteFault):
            return error.fault.retryable and (self.idempotent or error.fault.code in NOT_TAKEN)
        return isinstance(error, NoResponders) or (self.idempotent and isinstance(error, ConnectionLost))


ONCE = RetryPolicy(attempts=1)
THRICE = RetryPolicy()


def retry_after_s(error: BusError) -> float:
    """What the refusing worker asked for."""
    return error.fault.retry_after_ms / 1e3 if isinstance(error, RemoteFault) else 0.0
