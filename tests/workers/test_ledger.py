import time

import pytest

from bus import CallMeter, OperationReport
from bus.data_plane.transfer import TransferReport
from schemas.generate import Hop
from workers.ledger import Ledger


def test_hops_add_up_to_the_elapsed_time_and_stand_in_the_order_of_the_way() -> None:
    ledger = Ledger("prefill")
    time.sleep(0.03)
    ledger.call("encode", CallMeter(100, 50, 12.0), [Hop(name="encode", bytes=0, ms=9.0)], 9.0)
    ledger.own()
    report = OperationReport(TransferReport(4096, 1, 1, 10, 20), 0.5)
    ledger.transfer("kv", report, 2.0)
    time.sleep(0.01)
    hops, elapsed_ms = ledger.close()
    assert [hop.name for hop in hops] == ["bus prefill->encode", "encode", "prefill", "kv"]
    assert sum(hop.ms for hop in hops) == pytest.approx(elapsed_ms, abs=0.01)
    by_name = {hop.name: hop for hop in hops}
    assert (by_name["bus prefill->encode"].bytes, by_name["bus prefill->encode"].ms) == (150, 3.0)
    assert by_name["kv"].bytes == 4096
    assert by_name["prefill"].ms > 10


def test_a_stage_that_calls_nobody_has_one_hop() -> None:
    hops, elapsed_ms = Ledger("decode").close()
    assert [hop.name for hop in hops] == ["decode"]
    assert hops[0].ms == pytest.approx(elapsed_ms, abs=0.01)
