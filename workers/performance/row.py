"""Operations of one size, summed up. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from bus import OperationReport
from schemas.performance import PerformanceRow


class Sample(NamedTuple):
    """One operation."""

    elapsed_us: float
    wire_us: float
    num_bytes: int


def sample_of(elapsed_s: float, report: OperationReport) -> Sample:
    """An operation's sample. NIXL's time where it is one number: those of several chunks overlap."""
    transfer = report.transfer
    wire_us = float(transfer.transfer_us) if transfer.num_chunks == 1 else report.wire_ms * 1e3
    return Sample(elapsed_s * 1e6, max(wire_us, 1.0), transfer.num_bytes)  # NIXL counts whole microseconds


def row_of(size_bytes: int, samples: Sequence[Sample]) -> PerformanceRow:
    """The row of one or more samples."""
    elapsed_us = [sample.elapsed_us for sample in samples]
    wire_p50_us = percentile([sample.wire_us for sample in samples], 50)
    return PerformanceRow(
        size_bytes=size_bytes,
        num_operations=len(samples),
        num_bytes=sum(sample.num_bytes for sample in samples),
        p50_us=percentile(elapsed_us, 50),
        p99_us=percentile(elapsed_us, 99),
        wire_p50_us=wire_p50_us,
        bytes_per_s=size_bytes / wire_p50_us * 1e6,
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """The least of `values` that `percent` of them don't exceed (nearest rank)."""
    rank = max(1, math.ceil(percent / 100 * len(values)))
    return sorted(values)[rank - 1]
