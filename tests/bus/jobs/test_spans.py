"""A job's trace: the submission, and every delivery below it."""

import os
from collections.abc import AsyncIterator

import pytest

import observability
from bus import Bus
from observability import OtlpReceiver
from tests.bus.jobs.queues import Task, queue, until


@pytest.fixture
async def receiver(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OtlpReceiver]:
    for name in os.environ:
        if name.startswith("OTEL_"):
            monkeypatch.delenv(name)
    async with OtlpReceiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        observability.configure("jobs", instance_id="jobs-1", service_version="1")
        yield running
        observability.shutdown()


@pytest.mark.parametrize("job_id", ["traced", ""])
async def test_each_delivery_is_a_span_below_the_submission_and_links_to_the_one_before(
    receiver: OtlpReceiver, bus: Bus, caller: Bus, job_id: str
) -> None:
    config, tries = queue(), list[int]()

    async def handler(task: Task) -> None:
        tries.append(task.number)
        if len(tries) == 1:
            raise ValueError("once")

    await caller.submit(config, Task(), job_id=job_id)
    consumer = await bus.work(config, handler)
    await until(lambda: consumer.stats.num_done == 1 and consumer.num_active == 0)
    observability.flush()
    trace_id = receiver.store.last_trace_id()
    assert trace_id is not None
    spans = receiver.store.trace(trace_id)
    (sent,) = [span for span in spans if span.name.startswith("send job.")]
    first, second = sorted(
        (span for span in spans if span.name.startswith("process job.")),
        key=lambda span: span.attributes["nixl.job.delivery_count"],
    )
    assert sent.kind == "producer"
    assert first.kind == second.kind == "consumer"
    assert first.parent_id == second.parent_id == sent.span_id
    assert [link.span_id for link in first.links] == [sent.span_id]
    assert [link.span_id for link in second.links] == [sent.span_id, first.span_id]
    assert [each.attributes["nixl.job.delivery_count"] for each in (first, second)] == [1, 2]
    assert "ValueError" in str(first)
