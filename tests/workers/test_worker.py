"""What a worker's class declares, and what becomes of it on a real bus."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bus import (
    Bus,
    BusConfig,
    EmbeddedServer,
    EndpointConfig,
    Frame,
    LastFrame,
    Message,
    RemoteFault,
    RequestContext,
    current_request,
)
from bus.errors import RequestRefused
from schemas.fault import FaultCode
from schemas.stream import StreamEnd
from schemas.subjects import Subject
from workers import Worker, endpoint, job, on_event
from workers.declaration import DeclaredEndpoint, declared, request_type
from workers.roles import GRAPH_ROLES, role_class, role_names


class Add(Message, frozen=True, kw_only=True, tag="test.add"):
    a: int
    b: int = 0


class Sum(Message, frozen=True, kw_only=True, tag="test.sum"):
    total: int


class Number(Frame, frozen=True, kw_only=True, tag="test.number"):
    number: int


class Total(LastFrame, frozen=True, kw_only=True, tag="test.total"):
    total: int


@asynccontextmanager
async def refuse_13(context: RequestContext) -> AsyncIterator[None]:
    if isinstance(context.message, Add) and context.message.a == 13:
        raise RequestRefused(FaultCode.UNSUPPORTED, "not this one")
    if isinstance(context.message, Add) and context.message.a == 14:
        context.message = Add(a=100)
    yield


class Calculator(Worker):
    group = "math"
    middleware = (refuse_13,)

    def __init__(self, bus: Bus, offset: int = 0) -> None:
        super().__init__(bus)
        self.offset = offset
        self.log: list[str] = []

    async def start(self) -> None:
        self.log.append("start")

    async def stop(self) -> None:
        self.log.append("stop")

    @endpoint(concurrency=3, timeout_s=7)
    async def add(self, request: Add) -> Sum:
        return Sum(total=request.a + request.b + self.offset)

    @endpoint("upto")
    async def count(self, request: Add) -> AsyncGenerator[Number, None]:
        for number in range(request.a):
            yield Number(number=number)

    @endpoint()
    async def count_and_sum(self, request: Add) -> AsyncGenerator[Number | Total, None]:
        for number in range(request.a):
            yield Number(number=number)
        yield Total(total=sum(range(request.a)))

    @endpoint(direct=True)
    async def whoami(self, request: Add) -> Sum:
        context = current_request()
        assert context.worker_id == self.bus.worker_id
        return Sum(total=len(context.request_id))

    @job("slow-sums", max_deliver=2, backoff_s=(0.05,))
    async def sum_slowly(self, request: Add) -> None:
        self.log.append(f"job {request.a + request.b}")

    @on_event("added")
    async def on_added(self, event: Sum) -> None:
        self.log.append(f"added {event.total}")

    async def no_endpoint(self) -> None: ...


@pytest.fixture
async def calculator(nats: EmbeddedServer) -> AsyncIterator[Calculator]:
    config = BusConfig(worker_id="calculator-1", nats_url=nats.url)
    async with Calculator.running(config, 1000) as worker:
        yield worker


@pytest.fixture
async def client(nats: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="client", nats_url=nats.url), data_plane=False) as bus:
        yield bus


def test_endpoints_are_the_declared_methods_with_their_types() -> None:
    found = {each.stage: each for each in declared(Calculator, DeclaredEndpoint)}
    assert set(found) == {"add", "upto", "count_and_sum", "whoami"}
    assert (found["add"].options.concurrency, found["whoami"].options.direct) == (3, True)
    assert all(each.request_type is Add for each in found.values())
    assert found["count_and_sum"].reply_type == Number | Total


def test_a_class_tells_its_callers_where_what_and_how_long() -> None:
    call = Calculator.add
    assert (call.place.group, call.place.stage, call.request_type, call.reply_type, call.timeout_s) == (
        "math",
        "add",
        Add,
        Sum,
        7,
    )
    assert Calculator.count.timeout_s == Worker.timeout_s


async def test_a_declared_endpoint_is_called_by_its_class_and_typed(calculator: Calculator, client: Bus) -> None:
    reply = await client.request(Calculator.add, Add(a=1, b=2))
    assert reply.total == 1003
    assert (await calculator.add(Add(a=1))).total == 1001  # on an instance it is the method


async def test_a_stream_is_numbered_and_ended_by_the_framework(calculator: Calculator, client: Bus) -> None:
    frames = [frame async for frame in client.stream(Calculator.count, Add(a=3))]
    assert [(frame.seq, frame.number) for frame in frames] == [(0, 0), (1, 1), (2, 2)]
    assert [frame async for frame in client.stream(Calculator.count, Add(a=0))] == []
    *numbers, total = [frame async for frame in client.stream(Calculator.count_and_sum, Add(a=4))]
    assert len(numbers) == 4
    assert total == Total(seq=4, total=6)


async def test_a_direct_endpoint_is_one_instance_s(calculator: Calculator, client: Bus) -> None:
    assert (await client.request(Calculator.whoami.at("calculator-1"), Add(a=0))).total == 16


async def test_middleware_refuses_and_replaces(calculator: Calculator, client: Bus) -> None:
    with pytest.raises(RemoteFault, match="not this one") as caught:
        await client.request(Calculator.add, Add(a=13))
    assert caught.value.fault.code == "unsupported"
    assert (await client.request(Calculator.add, Add(a=14))).total == 1100


async def test_a_job_is_submitted_by_its_class_done_and_listed(calculator: Calculator, client: Bus) -> None:
    job_id = secrets.token_hex(8)
    receipt = await client.submit(Calculator.sum_slowly, Add(a=20, b=3), job_id=job_id)
    assert (receipt.job_id, receipt.duplicate) == (job_id, False)
    assert (await client.submit(Calculator.sum_slowly, Add(a=20, b=3), job_id=job_id)).duplicate
    async with asyncio.timeout(10):
        while "job 23" not in calculator.log:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    (service,) = [each for each in await client.services() if each["id"] == "calculator-1"]
    (listed,) = [each for each in service["endpoints"] if each["metadata"]["kind"] == "job"]
    assert (listed["name"], listed["subject"]) == ("slow-sums", "nixlbus.v1.job.math.slow-sums")
    assert (listed["metadata"]["request"], listed["num_errors"]) == ("test.add", 0)
    assert calculator.log.count("job 23") == 1


async def test_events_reach_every_handler(calculator: Calculator, client: Bus) -> None:
    await calculator.emit("added", Sum(total=5))
    await client.publish(client.subjects.event("somebody", "added"), Sum(total=6))
    await client.request(Calculator.add, Add(a=1))
    for _ in range(100):
        if len(calculator.log) == 3:
            break
        await client.request(Calculator.add, Add(a=1))
    assert sorted(calculator.log) == ["added 5", "added 6", "start"]  # of two senders, so in any order


async def test_a_worker_starts_before_it_serves_and_stops_after_it_drained(nats: EmbeddedServer) -> None:
    async with Calculator.running(BusConfig(worker_id="c", nats_url=nats.url)) as worker:
        assert worker.not_ready == ""
        await worker.bus.drain(1)
        assert worker.not_ready == "draining"
    assert worker.log == ["start", "stop"]


class Fragile(Worker):
    """Says which of its steps were taken; `failing` raises."""

    def __init__(self, bus: Bus, failing: str = "") -> None:
        super().__init__(bus)
        self.failing = failing
        self.log: list[str] = []
        self.begun = asyncio.Event()

    async def start(self) -> None:
        self.log.append("start")
        if self.failing == "start":
            raise OSError("the disk is full")

    async def serve(self) -> None:
        if self.failing == "serve":
            raise OSError("the disk is full")
        await super().serve()

    async def stop(self) -> None:
        self.log.append("stop")

    @endpoint(timeout_s=600)
    async def wait(self, request: Add) -> Sum:
        self.begun.set()
        await asyncio.sleep(600)
        return Sum(total=0)


@pytest.mark.parametrize(("failing", "steps"), [("start", ["start"]), ("serve", ["start", "stop"])])
async def test_what_started_is_stopped_and_nothing_else(client: Bus, failing: str, steps: list[str]) -> None:
    worker = Fragile(client, failing)
    with pytest.raises(OSError, match="the disk is full"):
        async with worker.serving():
            raise AssertionError("it served")
    assert worker.log == steps


async def test_a_drain_that_is_cancelled_ends_tells_its_callers_and_stops(nats: EmbeddedServer, client: Bus) -> None:
    workers: list[Fragile] = []
    leave = asyncio.Event()

    async def live() -> None:
        async with Fragile.running(BusConfig(worker_id="fragile", nats_url=nats.url), drain_timeout_s=600) as worker:
            workers.append(worker)
            await leave.wait()

    living = asyncio.create_task(live())
    asking = asyncio.create_task(client.request(Fragile.wait, Add(a=1)))
    async with asyncio.timeout(10):
        while not workers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        await workers[0].begun.wait()
        leave.set()
        while workers[0].not_ready != "draining":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        living.cancel()
        with pytest.raises(RemoteFault) as caught:
            await asking
        assert caught.value.fault.code == "cancelled"
        with pytest.raises(asyncio.CancelledError):
            await living
    assert workers[0].log == ["start", "stop"]


async def test_a_declaration_without_types_is_refused_before_anything_is_served(nats: EmbeddedServer) -> None:
    class Vague(Worker):
        @endpoint()
        async def a_fine_one(self, request: Add) -> Sum:
            return Sum(total=0)

        @endpoint()
        async def vague(self, request: Any) -> Any: ...

    with pytest.raises(TypeError, match=r"vague must take one argument, annotated with a Message class"):
        async with Vague.running(BusConfig(worker_id="v", nats_url=nats.url)):
            raise AssertionError("it served")


async def test_a_stream_of_messages_that_are_no_frames_is_refused_before_anything_is_served(
    nats: EmbeddedServer,
) -> None:
    class Plain(Worker):
        @endpoint()
        async def plain(self, request: Add) -> AsyncGenerator[Number | Sum, None]:
            yield Sum(total=0)

    with pytest.raises(TypeError, match=r"Plain\.plain yields Sum: what a stream yields must be a Frame class"):
        async with Plain.running(BusConfig(worker_id="p", nats_url=nats.url)):
            raise AssertionError("it served")


class Numbered(Message, frozen=True, kw_only=True, tag="test.numbered"):
    seq: int


async def test_a_handler_without_a_class_may_still_number_its_messages_itself(
    nats: EmbeddedServer, client: Bus
) -> None:
    async def numbered(request: Add) -> AsyncGenerator[Numbered | StreamEnd, None]:
        yield Numbered(seq=0)
        yield Numbered(seq=1)
        yield StreamEnd(seq=2)

    subject = Subject("test.numbered", "test.numbered")
    async with Bus.open(BusConfig(worker_id="old", nats_url=nats.url), data_plane=False) as old:
        await old.serve(EndpointConfig("numbered", subject, Add), numbered)
        frames = [frame async for frame in client.stream(subject, Add(a=0), Numbered, timeout_s=5)]
    assert frames == [Numbered(seq=0), Numbered(seq=1)]


def test_a_handler_whose_request_has_no_message_type_is_refused() -> None:
    async def untyped(request: Any) -> Any:
        return request

    async def two(request: Add, more: int) -> Any:
        return request, more

    for handler in (untyped, two):
        with pytest.raises(TypeError, match="annotated with a Message class"):
            request_type(handler)


def test_a_role_is_named_after_its_class_and_its_group_after_its_role() -> None:
    class ThumbnailMaker(Worker): ...

    assert (ThumbnailMaker.role, ThumbnailMaker.group) == ("thumbnail-maker", "thumbnail-maker")
    assert (Calculator.role, Calculator.group) == ("calculator", "math")


class Base(Worker):
    """What an application's workers share; it writes no group."""


class Increment(Base):
    @endpoint()
    async def run(self, request: Add) -> Sum:
        return Sum(total=request.a + 1)


class Negate(Base):
    @endpoint()
    async def run(self, request: Add) -> Sum:
        return Sum(total=-request.a)


async def test_subclasses_of_a_base_that_writes_no_group_do_not_share_their_requests(
    nats: EmbeddedServer, client: Bus
) -> None:
    async with (
        Increment.running(BusConfig(worker_id="increment-1", nats_url=nats.url)),
        Negate.running(BusConfig(worker_id="negate-1", nats_url=nats.url)),
    ):
        for a in range(8):
            assert (await client.request(Increment.run, Add(a=a))).total == a + 1
            assert (await client.request(Negate.run, Add(a=a))).total == -a


def test_a_group_is_inherited_from_the_nearest_class_that_writes_it() -> None:
    class Staging(Calculator): ...

    class Both(Base, Staging): ...

    class Production(Both):
        group = "production"

    class OnItsOwn(Staging):
        group = ""

    class AfterThat(OnItsOwn): ...

    assert (Staging.role, Staging.group) == ("staging", "math")
    assert (Base.group, Both.group, Production.group) == ("base", "math", "production")
    assert (OnItsOwn.group, AfterThat.group) == ("on-its-own", "after-that")


def test_every_role_has_a_class_that_bears_its_name() -> None:
    assert set(GRAPH_ROLES) < set(role_names())
    assert all(role_class(name).role == name for name in role_names())
