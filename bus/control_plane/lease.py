"""How long a delivery is surely ours: until then the server can't have given it to anybody else.

In: when the server last proved that it had heard of us. Out: `Lease.is_sure`.
JetStream delivers a message again when it heard nothing about it for ack_wait, counted from the delivery or from the
last `in_progress` that it took. We don't see its clock, but its answers prove enough: what it confirmed, it took no
earlier than we said it; and what arrives after an answer was delivered after the question, since a consumer sends
answers and deliveries through one queue (nats-server, `consumer.sendAckReply`, `consumer.deliverMsg`).
Invariants: every doubt ends a lease: a stopped process, a blocked event loop, a link that swallowed what we said, a
lost connection. A lease that ran out is never renewed. Leaves out: what is done without one (`bus.jobs.settlement`).
"""

import math
import time

SURE_PART = 0.75
"""Of ack_wait. The rest is for our word's way to the server."""
_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def now_s() -> float:
    """Seconds that pass in a suspended machine too, where the system has such a clock."""
    return time.clock_gettime(_CLOCK)


class Horizon:
    """The moment before which nothing was delivered that arrives from now on; one for each consumer."""

    def __init__(self) -> None:
        self.at_s = -math.inf

    def advance(self, at_s: float) -> None:
        """An answer has arrived to what was said at `at_s`."""
        self.at_s = max(self.at_s, at_s)

    def forget(self) -> None:
        """The connection was lost: what arrives next may be of any age, or known to a server that forgot."""
        self.at_s = -math.inf


class Lease:
    """What is known of one delivery."""

    __slots__ = ("_ack_wait_s", "_heard_s")

    def __init__(self, heard_s: float, ack_wait_s: float) -> None:
        """`heard_s`: it was delivered no earlier, by `now_s`."""
        self._heard_s = heard_s
        self._ack_wait_s = ack_wait_s

    @property
    def is_sure(self) -> bool:
        """Whether what is said about the delivery now reaches the server while it is ours."""
        return now_s() - self._heard_s < SURE_PART * self._ack_wait_s

    def renew(self, said_s: float) -> None:
        """The server has just confirmed an `in_progress` of `said_s`; it changes nothing if that may have been late."""
        if now_s() - self._heard_s < self._ack_wait_s:
            self._heard_s = max(self._heard_s, said_s)

    def end(self) -> None:
        """Nothing is sure any more."""
        self._heard_s = -math.inf
