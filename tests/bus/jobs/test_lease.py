"""How long a delivery is surely ours, by its own clock."""

import math
import time

from bus.control_plane import lease
from bus.control_plane.lease import Horizon, Lease, now_s


def test_a_lease_is_sure_for_most_of_ack_wait_and_no_longer() -> None:
    assert Lease(now_s() - 0.7, 1.0).is_sure
    assert not Lease(now_s() - 0.8, 1.0).is_sure
    assert not Lease(-math.inf, 1.0).is_sure


def test_what_the_server_confirmed_in_time_renews_a_lease() -> None:
    kept = Lease(now_s() - 0.8, 1.0)
    kept.renew(now_s())
    assert kept.is_sure


def test_a_lease_that_ran_out_is_never_sure_again() -> None:
    for over in (Lease(now_s() - 1.1, 1.0), Lease(-math.inf, 1.0), Lease(now_s(), 1.0)):
        over.end()
        over.renew(now_s())
        assert not over.is_sure


def test_a_confirmation_that_came_too_late_renews_nothing() -> None:
    late = Lease(now_s() - 1.1, 1.0)  # another may have the job by now, and the server says yes to whatever it is told
    late.renew(now_s() - 0.5)
    assert not late.is_sure


def test_an_older_answer_moves_nothing_back() -> None:
    horizon = Horizon()
    assert horizon.at_s == -math.inf
    horizon.advance(5)
    horizon.advance(3)
    assert horizon.at_s == 5
    horizon.forget()
    assert horizon.at_s == -math.inf


def test_the_clock_counts_what_the_machine_slept() -> None:
    assert lease._CLOCK == time.CLOCK_BOOTTIME
