"""Too much work is refused with a time to come back; what was refused goes elsewhere, and nothing is done twice."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable

import pytest

from bus import (
    Bus,
    BusConfig,
    ConnectionLost,
    EmbeddedServer,
    EndpointConfig,
    Frame,
    NoResponders,
    PoolExhausted,
    RemoteFault,
    RetryPolicy,
)
from bus.control_plane.call import MAX_PASSES
from bus.control_plane.retry import THRICE
from bus.errors import Overloaded, RequestRefused
from schemas.fault import Fault, FaultCode
from schemas.message import Message
from schemas.subjects import Subject

LONG_S = 20.0
SOON_S = 3.0


class Ask(Message, frozen=True, kw_only=True, tag="load.ask"):
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="load.told"):
    by: str = ""


class Counted(Frame, frozen=True, kw_only=True, tag="load.counted"):
    by: str = ""


def subject(name: str) -> Subject:
    return Subject(f"load.{name}", f"load.{name}")


async def serve(bus: Bus, name: str, handler: object, **fields: object) -> None:
    config = EndpointConfig(name, subject(name), Ask, queue_group="q", **fields)  # type: ignore[arg-type]
    await bus.serve(config, handler)  # type: ignore[arg-type]


class Instance:
    """A handler that counts its calls, and raises if it is told to."""

    def __init__(self, name: str, error: Callable[[], BaseException] | None = None) -> None:
        self.name = name
        self.num_calls = 0
        self.error = error

    async def __call__(self, request: Ask) -> Told:
        self.num_calls += 1
        if self.error:
            raise self.error()
        return Told(by=self.name)


@pytest.fixture
async def second(server: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="second", nats_url=server.url), data_plane=False) as opened:
        yield opened


async def test_a_refusal_for_load_tells_when_to_come_back(bus: Bus, caller: Bus) -> None:
    async def slow(request: Ask) -> Told:
        await asyncio.sleep(0.1)
        return Told()

    await serve(bus, "full", slow, concurrency=1, max_queued=1)
    asking = [caller.request(subject("full"), Ask(), Told, timeout_s=LONG_S) for _ in range(8)]
    outcomes = await asyncio.gather(*asking, return_exceptions=True)
    refusals = [outcome.fault for outcome in outcomes if isinstance(outcome, RemoteFault)]
    assert sum(isinstance(outcome, Told) for outcome in outcomes) == 2
    assert [(fault.code, fault.retryable) for fault in refusals] == [("overloaded", True)] * 6
    assert all(fault.retry_after_ms > 0 for fault in refusals)
    started_s = time.monotonic()
    again = [caller.request(subject("full"), Ask(), Told, timeout_s=LONG_S) for _ in range(4)]
    outcomes = await asyncio.gather(*again, return_exceptions=True)
    (fault, *_) = [outcome.fault for outcome in outcomes if isinstance(outcome, RemoteFault)]
    assert fault.retry_after_ms >= 80  # it has learned what a request takes
    assert time.monotonic() - started_s < SOON_S


async def test_a_caller_that_waits_as_it_is_told_is_served_in_the_end(bus: Bus, caller: Bus) -> None:
    async def slow(request: Ask) -> Told:
        await asyncio.sleep(0.02)
        return Told()

    await serve(bus, "patient", slow, concurrency=2, max_queued=2)
    patient = RetryPolicy(attempts=30)
    asking = [caller.request(subject("patient"), Ask(), Told, timeout_s=LONG_S, retry=patient) for _ in range(20)]
    assert await asyncio.gather(*asking) == [Told()] * 20


@pytest.mark.parametrize(
    "refusal",
    [RequestRefused(FaultCode.DRAINING, "on its way out"), Overloaded("too much", retry_after_ms=1)],
    ids=["draining", "overloaded"],
)
async def test_what_one_instance_refuses_another_serves(
    bus: Bus, second: Bus, caller: Bus, refusal: BaseException
) -> None:
    name = f"elsewhere-{type(refusal).__name__.lower()}"
    refusing, serving = Instance("refusing", lambda: refusal), Instance("serving")
    await serve(bus, name, refusing)
    await serve(second, name, serving)
    for _ in range(60):
        assert (await caller.request(subject(name), Ask(), Told, timeout_s=LONG_S, retry=THRICE)).by == "serving"
    assert serving.num_calls == 60
    assert 5 < refusing.num_calls <= 60  # met by chance, and never twice in one call


async def test_a_stream_that_one_instance_refuses_another_serves(bus: Bus, second: Bus, caller: Bus) -> None:
    async def refuse(request: Ask) -> AsyncGenerator[Counted, None]:
        if request.number >= 0:
            raise RequestRefused(FaultCode.DRAINING, "on its way out")
        yield Counted()

    async def stream(request: Ask) -> AsyncGenerator[Counted, None]:
        yield Counted(by="second")

    await serve(bus, "stream", refuse)
    await serve(second, "stream", stream)
    for _ in range(20):
        frames = caller.stream(subject("stream"), Ask(), Counted, timeout_s=LONG_S, retry=THRICE)
        assert [frame.by async for frame in frames] == ["second"]


async def test_a_busy_instance_is_passed_over_without_waiting_for_it(bus: Bus, second: Bus, caller: Bus) -> None:
    refusing = Instance("refusing", lambda: Overloaded("for long", retry_after_ms=5000))
    await serve(bus, "busy", refusing)
    await serve(second, "busy", Instance("serving"))
    started_s = time.monotonic()
    for _ in range(20):
        assert (await caller.request(subject("busy"), Ask(), Told, timeout_s=LONG_S, retry=THRICE)).by == "serving"
    assert refusing.num_calls > 0
    assert time.monotonic() - started_s < SOON_S


async def test_the_only_instance_is_asked_again_though_it_refused(bus: Bus, caller: Bus) -> None:
    calls: list[float] = []

    async def at_third(request: Ask) -> Told:
        calls.append(time.monotonic())
        if len(calls) < 3:
            raise Overloaded("a moment", retry_after_ms=150)
        return Told(by="only")

    await serve(bus, "only", at_third)
    assert (await caller.request(subject("only"), Ask(), Told, timeout_s=LONG_S, retry=THRICE)).by == "only"
    assert len(calls) == 3
    assert calls[2] - calls[1] >= 0.15  # it is known by then that there is nobody else, and when to come back


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("no"), "internal"),
        (RequestRefused(FaultCode.INVALID_PROMPT, "no"), "invalid_prompt"),
        (NoResponders("nobody further on", subject="x"), "no_responders"),
        (ConnectionLost("in the middle of it"), "connection_lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_what_was_begun_is_not_done_twice(bus: Bus, caller: Bus, error: BaseException, code: str) -> None:
    instance = Instance("failing", lambda: error)
    name = f"begun-{code.replace('_', '-')}"
    await serve(bus, name, instance)
    with pytest.raises(RemoteFault) as caught:
        await caller.request(subject(name), Ask(), Told, timeout_s=LONG_S, retry=THRICE)
    assert (caught.value.fault.code, instance.num_calls) == (code, 1)


async def test_an_invalid_message_is_not_sent_again(bus: Bus, caller: Bus) -> None:
    instance = Instance("never")
    await serve(bus, "invalid", instance)
    with pytest.raises(RemoteFault) as caught:
        await caller.request(subject("invalid"), Told(), Told, timeout_s=LONG_S, retry=THRICE)
    (endpoint,) = [e for e in bus._endpoints if e.config.name == "invalid"]
    assert (caught.value.fault.code, endpoint.stats.num_requests) == ("unknown_message_type", 1)
    assert instance.num_calls == 0


async def test_a_refusal_further_down_is_no_reason_to_repeat_the_hop_that_met_it(
    bus: Bus, second: Bus, caller: Bus
) -> None:
    calls: Counter[str] = Counter()

    async def hop(request: Ask) -> Told:
        calls["hop"] += 1
        return await bus.request(subject("further"), request, Told, timeout_s=LONG_S)

    async def further(request: Ask) -> Told:
        calls["further"] += 1
        raise Overloaded("down there", retry_after_ms=1)

    await serve(bus, "hop", hop)
    await serve(second, "further", further)
    with pytest.raises(RemoteFault) as caught:
        await caller.request(subject("hop"), Ask(), Told, timeout_s=LONG_S, retry=THRICE)
    assert caught.value.fault.hops == ["serving"]
    assert calls == {"hop": 1, "further": 1}


async def test_what_a_stopping_worker_had_begun_is_not_done_twice(server: EmbeddedServer, caller: Bus) -> None:
    begun: Counter[str] = Counter()
    running = asyncio.Event()

    async def slow(request: Ask) -> Told:
        begun["calls"] += 1
        running.set()
        await asyncio.sleep(LONG_S)
        return Told()

    config = BusConfig(worker_id="stopping", nats_url=server.url)
    async with Bus.open(config, data_plane=False, drain_timeout_s=0.1) as stopping:
        await serve(stopping, "stopping", slow)
        request = asyncio.create_task(
            caller.request(subject("stopping"), Ask(), Told, timeout_s=LONG_S, retry=RetryPolicy(attempts=3))
        )
        await asyncio.wait_for(running.wait(), SOON_S)
        async with Bus.open(BusConfig(worker_id="next", nats_url=server.url), data_plane=False) as following:
            await serve(following, "stopping", slow)
            await stopping.drain(0.1)
            with pytest.raises(RemoteFault):
                await asyncio.wait_for(request, SOON_S)
    assert begun == {"calls": 1}


async def test_only_an_idempotent_call_is_repeated_after_it_was_begun(bus: Bus, second: Bus, caller: Bus) -> None:
    failing, serving = Instance("failing", lambda: ConnectionLost("in the middle")), Instance("serving")
    await serve(bus, "idempotent", failing)
    await serve(second, "idempotent", serving)
    harmless = RetryPolicy(attempts=3, idempotent=True)
    for _ in range(30):
        reply = await caller.request(subject("idempotent"), Ask(), Told, timeout_s=LONG_S, retry=harmless)
        assert reply.by == "serving"
    assert failing.num_calls > 0


async def test_nobody_listening_is_asked_again_within_the_attempts(bus: Bus, caller: Bus) -> None:
    async def later() -> None:
        await asyncio.sleep(0.1)
        await serve(bus, "later", Instance("late"))

    patient = RetryPolicy(attempts=50, first_pause_s=0.05, max_pause_s=0.05)
    served = asyncio.create_task(later())
    assert (await caller.request(subject("later"), Ask(), Told, timeout_s=LONG_S, retry=patient)).by == "late"
    await served
    with pytest.raises(NoResponders):
        await caller.request(subject("never"), Ask(), Told, timeout_s=LONG_S, retry=THRICE)


async def test_retries_end_with_the_deadline_and_not_after_it(bus: Bus, caller: Bus) -> None:
    instance = Instance("full", lambda: Overloaded("always", retry_after_ms=100))
    await serve(bus, "always", instance)
    endless = RetryPolicy(attempts=10_000)
    started_s = time.monotonic()
    with pytest.raises(RemoteFault) as caught:
        await caller.request(subject("always"), Ask(), Told, timeout_s=1.0, retry=endless)
    assert time.monotonic() - started_s < 1.5
    assert caught.value.fault.code == "overloaded"
    assert 3 <= instance.num_calls <= 15


def test_pauses_are_spread_so_that_the_refused_do_not_return_together() -> None:
    policy = RetryPolicy(attempts=10, first_pause_s=0.1, max_pause_s=0.4)
    fault = RemoteFault(Fault(code="overloaded", message="", retryable=True, retry_after_ms=1000))
    pauses = [policy.pause_s(fault, 3, 60.0) or 0.0 for _ in range(200)]
    assert min(pauses) >= 1.0
    assert max(pauses) - min(pauses) > 0.2
    assert policy.pause_s(fault, 3, 0.5) is None  # the deadline would have passed
    assert policy.pause_s(fault, 10, 60.0) is None


async def test_everybody_answers_a_question_to_all_faults_among_them(bus: Bus, second: Bus, caller: Bus) -> None:
    for each, instance in ((bus, Instance("one")), (second, Instance("two", lambda: ValueError("no")))):
        config = EndpointConfig("all", subject("all"), Ask)
        await each.serve(config, instance)
    replies = [r async for r in caller.request_many(subject("all"), Ask(), Told, timeout_s=LONG_S, max_replies=2)]
    assert [r.by for r in replies if isinstance(r, Told)] == ["one"]
    assert [r.fault.code for r in replies if isinstance(r, RemoteFault)] == ["internal"]
    started_s = time.monotonic()
    replies = [r async for r in caller.request_many(subject("all"), Ask(), Told, timeout_s=LONG_S, quiet_s=0.2)]
    assert len(replies) == 2
    replies = [r async for r in caller.request_many(subject("all"), Ask(), Told, timeout_s=0.4)]
    assert len(replies) == 2
    assert time.monotonic() - started_s < SOON_S
    replies = [r async for r in caller.request_many(subject("all"), Ask(), Told, timeout_s=LONG_S, max_replies=1)]
    assert len(replies) == 1
    with pytest.raises(NoResponders):
        _ = [r async for r in caller.request_many(subject("nobody"), Ask(), Told, timeout_s=LONG_S)]
    assert caller.stats()["requests_in_flight"] == 0


async def test_what_a_handler_had_begun_is_not_repeated_unless_it_refused(bus: Bus, caller: Bus) -> None:
    runs: Counter[str] = Counter()

    async def begin(request: Ask) -> Told:
        runs["begin"] += 1
        raise PoolExhausted("no memory for the receipt")

    async def refuse(request: Ask) -> Told:
        runs["refuse"] += 1
        raise RequestRefused(FaultCode.POOL_EXHAUSTED, "no memory, and nothing done")

    for name, handler in (("begin", begin), ("refuse", refuse)):
        await serve(bus, name, handler)
        with pytest.raises(RemoteFault) as caught:
            await caller.request(subject(name), Ask(), Told, timeout_s=LONG_S, retry=THRICE)
        assert caught.value.fault.code == "pool_exhausted"
        assert caught.value.fault.begun is (name == "begin")
    assert runs == {"begin": 1, "refuse": 3}


async def test_the_only_worker_is_not_asked_much_more_often_than_the_policy_says(bus: Bus, caller: Bus) -> None:
    release = asyncio.Event()

    async def hold(request: Ask) -> Told:
        await release.wait()
        return Told()

    await serve(bus, "only", hold, concurrency=1, max_queued=0)
    holding = asyncio.create_task(caller.request(subject("only"), Ask(), Told, timeout_s=LONG_S))
    await asyncio.sleep(0.1)
    before = bus.stats()["nats_in_msgs"]
    with pytest.raises(RemoteFault, match="wait for"):
        await caller.request(subject("only"), Ask(), Told, timeout_s=LONG_S, retry=THRICE)
    assert bus.stats()["nats_in_msgs"] - before <= 3 + MAX_PASSES
    release.set()
    await holding
