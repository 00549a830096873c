"""What claims must outlast, whose message a claim speaks of, and that no two queues share a consumer."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.aio.client import Client

from bus import Bus, DurableWorkUnavailable, current_job
from bus.jobs.claims import _Job
from schemas.codec import encode
from schemas.jobs import JOB_ID_HEADER, JobClaim, durable_name
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION
from schemas.subjects import IDENTIFIER
from tests.bus.jobs.queues import Task, noting, opened, queue, stoppable_server, until, until_dead

HEADERS = {PROTOCOL_HEADER: str(PROTOCOL_VERSION)}
DAY_S = 86_400.0
identifiers = st.from_regex(IDENTIFIER, fullmatch=True)


async def max_age_s(bus: Bus) -> float:
    info = await bus._durable._jetstream.api(f"STREAM.INFO.{bus._durable._streams.claims.name}")
    return float(info["config"]["max_age"]) / 1e9


@pytest.mark.parametrize(
    ("times", "at_least_s"),
    [({}, DAY_S), ({"backoff_s": (DAY_S,)}, 1.2 * DAY_S), ({"max_duration_s": 7 * DAY_S}, 7 * DAY_S)],
    ids=["default", "pause", "duration"],
)
async def test_claims_are_kept_for_as_long_as_a_job_of_the_queue_can_take(
    tmp_path: Path, times: dict[str, object], at_least_s: float
) -> None:
    async with stoppable_server(tmp_path) as server, opened(server.url, "w") as bus:
        await bus.work(queue(**times), noting([]))
        assert at_least_s <= await max_age_s(bus) < at_least_s + 2000
        await bus._durable._jetstream.api(f"STREAM.DELETE.{bus._durable._streams.claims.name}")
        consumer = await bus.work(queue(), noting([]))
        assert await max_age_s(bus) >= at_least_s, "it was made anew for the last queue alone"
        assert consumer.num_active == 0


async def test_a_queue_whose_attempts_would_be_forgotten_is_refused(tmp_path: Path) -> None:
    forgetful = queue(backoff_s=(3.0,), max_duration_s=1.0, ack_wait_s=1.0)
    async with stoppable_server(tmp_path) as server, opened(server.url, "w") as bus:
        client = Client()
        await client.connect(server.url)
        name = bus._durable._streams.claims.name
        await client.jetstream().add_stream(
            name=name,
            subjects=bus._durable._streams.claims.subjects,
            max_age=4.0,
            duplicate_window=1.0,
            allow_direct=True,
        )
        with pytest.raises(DurableWorkUnavailable, match="--max-age=6s"):
            await bus.work(forgetful, noting([]))
        await bus.work(queue(queue=forgetful.queue, idempotent_handler=True), noting([]))  # it keeps none
        tries = list[int]()

        async def handler(_: Task) -> None:
            tries.append(current_job().attempt)
            raise ValueError

        config = queue(max_duration_s=1.0, max_deliver=3)
        await bus.work(config, handler)
        await bus.submit(config, Task(), job_id="own")
        await until_dead(bus, config)
        assert tries == [1, 2, 3]
        await client.close()


@pytest.mark.parametrize("there", ["another queue's", "another job", "nothing"])
async def test_a_claim_of_a_message_that_is_not_there_any_more_keeps_no_job_from_being_done(
    bus: Bus, raw: Client, there: str
) -> None:
    """As when the stream was made anew: at the number of the claim's message lies something else, or nothing."""
    config, other, seen = queue(concurrency=1), queue(), list[int]()
    subject, claims = config.subject(bus.subjects).name, bus._durable._claims
    where = other.subject(bus.subjects).name if there == "another queue's" else subject
    job_id = "same" if there == "another queue's" else "different"
    await bus.submit(config, Task(number=1), job_id="same")
    lies = await raw.jetstream().publish(where, encode(Task(number=2)), headers=HEADERS | {JOB_ID_HEADER: job_id})
    claim = JobClaim(
        state="working",
        job_id="same",
        worker_id="gone",
        epoch="gone",
        delivery=1,
        stream_sequence=10_000_000 if there == "nothing" else lies.seq,
    )
    await claims.ensure()
    await bus._durable._jetstream.publish(claims._key(_Job(subject, "same")), encode(claim))
    await bus.work(config, noting(seen))
    await until(lambda: bool(seen))
    assert seen[0] == 1


@given(identifiers, identifiers, identifiers, identifiers)
def test_no_two_queues_share_a_consumer(graph: str, name: str, other_graph: str, other_name: str) -> None:
    same = (graph, name) == (other_graph, other_name)
    assert (durable_name(graph, name) == durable_name(other_graph, other_name)) is same


async def test_queues_whose_names_run_together_are_worked_on_side_by_side(bus: Bus) -> None:
    seen = list[tuple[str, int]]()
    base = queue().queue
    configs = [queue(graph="a_b", queue=base), queue(graph="a", queue=f"b_{base}")]
    for config in configs:

        async def handler(task: Task, graph: str = config.graph) -> None:
            seen.append((graph, task.number))

        await bus.work(config, handler)
    for number, config in enumerate(configs):
        await bus.submit(config, Task(number=number))
    await until(lambda: len(seen) == 2)
    assert sorted(seen) == [("a", 1), ("a_b", 0)]
