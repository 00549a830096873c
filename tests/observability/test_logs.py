"""Log lines: one per record, with the trace id beside it."""

import logging
import re
from collections.abc import Iterator

import pytest

import observability
from observability import OtlpReceiver


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


async def test_a_line_has_time_level_service_logger_message_and_trace(
    traced: OtlpReceiver, capsys: pytest.CaptureFixture[str]
) -> None:
    observability.configure_logging("info")
    with observability.span("work") as work:
        logging.getLogger("bus.control_plane").warning("reconnecting to %s", "a\nb")
    logging.getLogger("bus.control_plane").debug("unseen")
    [line] = capsys.readouterr().err.splitlines()
    pattern = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z WARNING frontend bus\.control_plane reconnecting to a\\nb trace="
    assert re.fullmatch(pattern + work.trace_id, line)


def test_an_exception_is_on_the_line_and_its_traceback_only_at_debug(capsys: pytest.CaptureFixture[str]) -> None:
    observability.configure_logging("INFO")
    log_an_error()
    [line] = capsys.readouterr().err.splitlines()
    assert " ERROR - workers failed error=ValueError: bad at " in line
    assert re.search(r"test_logs\.py:\d+$", line)
    observability.configure_logging(logging.DEBUG)
    log_an_error()
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-1] == "ValueError: bad"


def log_an_error() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        logging.getLogger("workers").exception("failed")


def test_a_second_configuration_replaces_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    observability.configure_logging("INFO")
    observability.configure_logging("WARNING")
    logging.getLogger("workers").info("unseen")
    logging.getLogger("workers").warning("seen")
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_unknown_level_is_an_error() -> None:
    with pytest.raises(ValueError, match="LOUD"):
        observability.configure_logging("loud")
