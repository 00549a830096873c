"""What an endpoint owes: one answer for each request whatever stands around its handler, an end in time, all events."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus import (
    Bus,
    BusConfig,
    EmbeddedServer,
    EndpointConfig,
    LocalProtocolError,
    PermissionDenied,
    RemoteFault,
    RequestContext,
)
from bus.control_plane.direct_client import MAX_HEADER_BYTES, header_block, parse_headers
from schemas.message import Message
from schemas.subjects import Subject
from tests.bus.control_plane.waiting import until

LONG_S = 20.0
PROMPTLY_S = 3.0


class Ask(Message, frozen=True, kw_only=True, tag="endpoint.ask"):
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="endpoint.told"):
    number: int = 0


def subject(name: str) -> Subject:
    return Subject(f"endpoint.{name}", f"endpoint.{name}")


async def echo(request: Ask) -> Told:
    return Told(number=request.number)


@asynccontextmanager
async def swallow(context: RequestContext) -> AsyncIterator[None]:
    with suppress(ValueError):
        yield


async def test_a_middleware_that_swallows_an_error_leaves_nobody_without_an_answer(bus: Bus, caller: Bus) -> None:
    async def fail(request: Ask) -> Told:
        raise ValueError("secret")

    await bus.serve(EndpointConfig("swallow", subject("swallow"), Ask, middleware=(swallow,)), fail)
    with pytest.raises(RemoteFault) as caught:
        await asyncio.wait_for(caller.request(subject("swallow"), Ask(), Told, timeout_s=LONG_S), PROMPTLY_S)
    assert caught.value.fault.code == "internal"
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "number", [{"concurrency": 0}, {"max_queued": -1}, *({"default_ttl_s": t} for t in (0, -1, math.inf, math.nan))]
)
def test_a_number_that_would_end_an_endpoint_is_refused_when_it_is_written(number: dict[str, float]) -> None:
    with pytest.raises(LocalProtocolError, match=r"(of|for) endpoint numbers"):
        EndpointConfig("numbers", subject("numbers"), Ask, **number)  # type: ignore[arg-type]


async def test_a_handler_that_will_not_stop_holds_up_no_closing(server: EmbeddedServer, caller: Bus) -> None:
    begun, let_go = asyncio.Event(), asyncio.Event()

    async def stubborn(request: Ask) -> Told:
        begun.set()
        while not let_go.is_set():
            with suppress(asyncio.CancelledError):
                await let_go.wait()
        return Told()

    config = BusConfig(worker_id="stubborn", nats_url=server.url)
    started_s = 0.0
    async with Bus.open(config, data_plane=False, drain_timeout_s=0.2) as leaving:
        await leaving.serve(EndpointConfig("stubborn", subject("stubborn"), Ask), stubborn)
        asking = asyncio.create_task(caller.request(subject("stubborn"), Ask(), Told, timeout_s=LONG_S))
        await begun.wait()
        started_s = time.monotonic()
    assert time.monotonic() - started_s < 10
    with pytest.raises(RemoteFault, match="stopped while it worked"):
        await asking
    let_go.set()


async def test_every_subscription_of_a_bus_gets_every_message(bus: Bus, raw: Client) -> None:
    heard: list[list[int]] = [[], [], []]

    def write_into(numbers: list[int]) -> Callable[[Ask], None]:
        return lambda event: numbers.append(event.number)

    for numbers, name in zip(heard, ("endpoint.event.a", "endpoint.event.a", "endpoint.event.*"), strict=True):
        await bus.subscribe(Subject(name, name), Ask, write_into(numbers))
    for number in range(100):
        await raw.publish("endpoint.event.a", b"\x82\xa4type\xacendpoint.ask\xa6number" + bytes([number]))
    await until(lambda: sum(map(len, heard)) >= 300)
    assert heard == [list(range(100))] * 3


async def test_an_event_makes_nobody_publish(bus: Bus, raw: Client) -> None:
    ended, heard = asyncio.Event(), []

    async def slow(event: Ask) -> None:
        await asyncio.sleep(0.3)
        ended.set()

    async def record(message: Msg) -> None:
        heard.append(message.subject)

    await bus.subscribe(subject("told"), Ask, slow)
    for victim in ("endpoint.victim", "_INBOX.victim.1"):
        await raw.subscribe(victim, cb=record)
    await raw.flush()
    await raw.flush()
    await raw.flush()
    payload = b"\x81\xa4type\xacendpoint.ask"
    for victim in ("endpoint.victim", "_INBOX.victim.1"):
        headers = {"Nixlbus-Request-Id": f"id-of-{victim.split('.')[0]}", "Nixlbus-Protocol": "2"}
        await raw.publish("endpoint.told", payload, reply=victim, headers=headers)
    await asyncio.wait_for(ended.wait(), PROMPTLY_S)
    await raw.flush()
    assert heard == []


async def test_a_caller_outside_of_the_inboxes_is_answered_and_not_probed(bus: Bus, raw: Client) -> None:
    async def slow(request: Ask) -> Told:
        await asyncio.sleep(0.3)
        return Told()

    await bus.serve(EndpointConfig("aside", subject("aside"), Ask), slow)
    replies = await raw.subscribe("endpoint.mine")
    mine = await raw.subscribe("mine.endpoint")
    await raw.flush()
    await raw.flush()
    headers = {"Nixlbus-Request-Id": "aside", "Nixlbus-Protocol": "2"}
    await raw.publish("endpoint.aside", b"\x81\xa4type\xacendpoint.ask", reply="mine.endpoint", headers=headers)
    reply = await mine.next_msg(PROMPTLY_S)
    assert b"endpoint.told" in reply.data
    assert replies.pending_msgs == 0


async def test_events_that_came_together_are_handled_in_order_and_one_that_is_late_ends_alone(
    bus: Bus, raw: Client
) -> None:
    handled: list[int] = []

    async def handle(event: Ask) -> None:
        if event.number == 1:
            await asyncio.sleep(60)
        handled.append(event.number)

    await bus.subscribe(subject("late"), Ask, handle, timeout_s=0.2)
    for number in range(5):
        await raw.publish("endpoint.late", b"\x82\xa4type\xacendpoint.ask\xa6number" + bytes([number]))
    await until(lambda: len(handled) == 4)
    assert handled == [0, 2, 3, 4]


async def test_a_denied_subject_is_the_fault_of_its_own_serve_and_leaves_nothing(bus: Bus) -> None:
    fine, secret = EndpointConfig("fine", subject("fine"), Ask), EndpointConfig("secret", subject("secret"), Ask)
    bus._connection._denied.add(secret.subject.name.lower())  # as a server's word would, before its answer to a flush
    served = await asyncio.gather(bus.serve(fine, echo), bus.serve(secret, echo), return_exceptions=True)
    assert served[0] is None
    assert isinstance(served[1], PermissionDenied)
    assert [endpoint.config.name for endpoint in bus._endpoints if endpoint.config.traced] == ["fine"]
    assert (await bus.request(fine.subject, Ask(number=3), Told, timeout_s=5)).number == 3


def test_headers_of_any_shape_are_read_in_one_pass() -> None:
    for evil in (
        b"NATS/1.0\r\n" + b"A: x\n" * 12_000 + b"\r\n\r\n",
        b"NATS/1.0\r\nA: x" + b" " * 60_000 + b"y\r\n\r\n",
        b"NATS/1.0\r\n" + b"a" * 60_000 + b"\r\n\r\n",
        b"NATS/1.0" + b"\n:" * 30_000,
    ):
        started_s = time.process_time()
        parse_headers(evil)
        assert time.process_time() - started_s < 2  # it would take minutes if it took more than one pass
    assert parse_headers(header_block({"Big": "x" * MAX_HEADER_BYTES})) == {}
    assert parse_headers(b"NATS/1.0 503 No Responders\r\n\r\n")["Status"] == "503"
    assert parse_headers(b"NATS/1.0\r\nA:1\r\nB:  two words \r\nno header\r\n\r\n") == {"A": "1", "B": "two words"}
