from hypothesis import given
from hypothesis import strategies as st

from bus import OperationReport, TransferReport
from workers.performance.row import percentile, row_of, sample_of

SAMPLES = st.lists(st.floats(0, 1e9), min_size=1, max_size=300)


def test_percentiles_are_values_that_occurred() -> None:
    values = [float(value) for value in range(100, 0, -1)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([3.0], 50) == percentile([3.0], 99) == 3.0


@given(values=SAMPLES, percent=st.integers(1, 100))
def test_so_many_percent_do_not_exceed_a_percentile(values: list[float], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) >= percent / 100 * len(values)


def report(num_bytes: int, num_chunks: int, transfer_us: int) -> OperationReport:
    return OperationReport(TransferReport(num_bytes, num_chunks, num_chunks, 1, transfer_us), wire_ms=2.5)


def test_one_chunk_takes_nixl_s_time_and_several_the_clock_around_them() -> None:
    assert sample_of(1e-3, report(10, 1, 40)).wire_us == 40
    assert sample_of(1e-3, report(10, 2, 4000)).wire_us == 2500


def test_a_transfer_of_no_measurable_time_has_a_finite_bandwidth() -> None:
    assert row_of(10, [sample_of(1e-3, report(10, 1, 0))]).bytes_per_s == 10e6


def test_a_row_counts_nixl_s_bytes_and_divides_one_operation_s_by_its_time_on_the_wire() -> None:
    row = row_of(4000, [sample_of(elapsed_us / 1e6, report(4000, 1, 20)) for elapsed_us in (100, 200, 300)])
    assert (row.size_bytes, row.num_operations, row.num_bytes) == (4000, 3, 12000)
    assert round(row.p50_us) == 200
    assert round(row.p99_us) == 300
    assert row.bytes_per_s == 200e6
