"""A real receiver and a configured exporter for the tests of this folder."""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

import observability
from observability import OtlpReceiver


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test sees the caller's OTEL_* variables, and each leaves tracing off."""
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    yield
    observability.shutdown(timeout_s=0.5)


@pytest.fixture
async def receiver() -> AsyncIterator[OtlpReceiver]:
    async with OtlpReceiver() as running:
        yield running


@pytest.fixture
def traced(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    """This process exports to the receiver as service `frontend`."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    observability.configure("frontend", instance_id="frontend-1", service_version="1.2.3")
    yield receiver
    observability.shutdown()  # while the receiver still runs
