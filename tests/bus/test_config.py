import time

import pytest

from bus import BusConfig, ConfigError, Deadline
from bus.deadline import working_under
from schemas.subjects import InvalidIdentifier


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("NIXLBUS_ARENA_MB", "plenty"),
        ("NIXLBUS_ARENA_MB", "0"),
        ("NIXLBUS_HANDSHAKE_TIMEOUT_S", "-1"),
        ("NIXLBUS_CONNECT_TIMEOUT_S", "soon"),
        ("NIXLBUS_CHUNK_MB", "0.0001"),
    ],
)
def test_a_bad_variable_is_an_error_that_names_it(variable: str, value: str) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        BusConfig.from_env("decode", {variable: value})
    assert caught.value.variable == variable


def test_worker_ids_are_fresh_unless_given_and_checked() -> None:
    assert BusConfig.from_env("decode", {}).worker_id != BusConfig.from_env("decode", {}).worker_id
    assert BusConfig.from_env("decode", {"NIXLBUS_WORKER_ID": "d1"}).worker_id == "d1"
    with pytest.raises(InvalidIdentifier):
        BusConfig(worker_id="a.*")


def test_a_deadline_is_cut_to_the_outer_one() -> None:
    with working_under(Deadline.after(0.5)):
        assert Deadline.after(60).remaining_s <= 0.5
        assert Deadline.after(0.1).remaining_s <= 0.1
    assert Deadline.after(60).remaining_s > 59
    assert Deadline(time.monotonic() - 1).expired
    assert Deadline(time.monotonic() - 1).remaining_ms == 0
