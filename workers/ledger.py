"""The ledger of a request: which part of its way carried how many bytes and took how many milliseconds.

In: a stage's own clock and the hops that the next stage reports. Out: hops whose milliseconds add up to the stage's
elapsed time, exactly: what a call took beyond what its worker reports is the bus's, what is left is the stage's own.
No clocks of two processes are compared.
"""

import time
from collections.abc import Sequence

from bus import CallMeter, OperationReport
from schemas.generate import Hop


class Ledger:
    """Kept by one stage while it serves one request."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._started_s = time.perf_counter()
        self._hops: list[Hop] = []

    def call(self, next_stage: str, meter: CallMeter, hops: Sequence[Hop], elapsed_ms: float) -> None:
        """Enter a call to `next_stage`: the bus's share first, then what that worker reports."""
        bus_ms = max(0.0, meter.elapsed_ms - elapsed_ms)
        num_bytes = meter.sent_bytes + meter.received_bytes
        self._hops.append(Hop(name=f"bus {self._stage}->{next_stage}", bytes=num_bytes, ms=round(bus_ms, 3)))
        self._hops.extend(hops)

    def transfer(self, name: str, report: OperationReport, elapsed_ms: float) -> None:
        """Enter a transfer: NIXL's bytes, and the time from the begin of the operation to its ack."""
        self._hops.append(Hop(name=name, bytes=report.transfer.num_bytes, ms=round(elapsed_ms, 3)))

    def own(self) -> None:
        """Enter what the stage itself has taken so far."""
        own_ms = (time.perf_counter() - self._started_s) * 1e3 - sum(hop.ms for hop in self._hops)
        self._hops.append(Hop(name=self._stage, bytes=0, ms=round(own_ms, 3)))

    def close(self) -> tuple[list[Hop], float]:
        """The hops, and the elapsed milliseconds that they add up to; what is left is the stage's own."""
        if not any(hop.name == self._stage for hop in self._hops):
            self.own()
        elapsed_ms = round((time.perf_counter() - self._started_s) * 1e3, 3)
        left_ms = elapsed_ms - sum(hop.ms for hop in self._hops)
        hops = [
            Hop(name=hop.name, bytes=hop.bytes, ms=round(hop.ms + left_ms, 3)) if hop.name == self._stage else hop
            for hop in self._hops
        ]
        return hops, elapsed_ms
