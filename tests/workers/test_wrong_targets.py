"""What is asked for in a way that it isn't taken: refused before anything is sent, with the way that it is."""

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import pytest

from bus import Bus, BusConfig, EmbeddedServer, Frame, LocalProtocolError, Message, current_request
from schemas.subjects import Subject
from workers import Worker, endpoint, job, on_event


class Ask(Message, frozen=True, kw_only=True, tag="target.ask"):
    number: int = 0
    anything: Any = None


class Told(Message, frozen=True, kw_only=True, tag="target.told"):
    number: int = 0


class Part(Frame, frozen=True, kw_only=True, tag="target.part"):
    number: int = 0


class Studio(Worker):
    @endpoint()
    async def shrink(self, request: Ask) -> Told:
        return Told(number=request.number)

    @endpoint()
    async def shrink_many(self, request: Ask) -> AsyncGenerator[Part, None]:
        yield Part(number=request.number)

    @job()
    async def archive(self, request: Ask) -> None: ...

    @on_event("made")
    async def on_made(self, event: Told) -> None:
        assert current_request().message == event


SUBJECT = Subject("target.subject", "target.subject")


@pytest.fixture
async def client(nats: EmbeddedServer) -> AsyncIterator[Bus]:
    async with Bus.open(BusConfig(worker_id="client", nats_url=nats.url), data_plane=False) as bus:
        yield bus


async def call(bus: Bus, method: str, *arguments: Any, **more: Any) -> None:
    """As a user without a type checker does it."""
    answer = getattr(bus, method)(*arguments, **more)
    if hasattr(answer, "__anext__"):
        await anext(answer)
    else:
        await answer


@pytest.mark.parametrize(
    ("method", "target", "what", "remedy"),
    [
        ("request", Studio.archive, r"the queue of jobs studio\.archive", r"bus\.submit"),
        ("request", Studio.shrink_many, r"the endpoint studio\.shrink_many, which answers with a str", r"bus\.stream"),
        ("request", Studio.on_made, r"Studio\.on_made, a handler of 'made' events", r"bus\.publish"),
        ("request", "nixlbus.v1.graph.studio.shrink", r"the str 'nixlbus\.v1", r"bus\.subjects"),
        ("request", Studio, "Studio, which is no declaration", r"bus\.subjects"),
        ("request", None, "NoneType, which is no declaration", r"bus\.subjects"),
        ("stream", Studio.shrink, r"the endpoint studio\.shrink, which returns one reply", r"bus\.request"),
        ("stream", "a.b", r"the str 'a\.b'", r"bus\.subjects"),
        ("request_many", "a.b", r"the str 'a\.b'", r"bus\.subjects"),
        ("request_many", Studio.shrink_many, r"the endpoint studio\.shrink_many", r"bus\.stream"),
        ("submit", Studio.shrink, r"the endpoint studio\.shrink,", r"bus\.request"),
        ("submit", Studio.on_made, "a handler", r"bus\.publish"),
        ("submit", "a.b", r"the str 'a\.b'", r"bus\.subjects"),
        ("publish", Studio.archive, "the queue of jobs", r"bus\.submit"),
        ("publish", "a.b", r"the str 'a\.b'", r"bus\.subjects"),
    ],
)
async def test_a_target_of_another_kind_is_refused_with_the_method_that_takes_it(
    client: Bus, method: str, target: Any, what: str, remedy: str
) -> None:
    with pytest.raises(LocalProtocolError, match=rf"bus\.{method} was given .*{what}.*; .*{remedy}"):
        await call(client, method, target, Ask())


@pytest.mark.parametrize("target", ["event.*.made", Studio.on_made, [SUBJECT, "event.*.made"]])
async def test_what_is_no_subject_is_not_subscribed_to(client: Bus, target: Any) -> None:
    with pytest.raises(LocalProtocolError, match=r"bus\.subscribe was given"):
        await client.subscribe(target, Ask, lambda event: None)


@pytest.mark.parametrize(
    ("method", "arguments", "more", "missing"),
    [
        ("request", (Told,), {}, "timeout_s"),
        ("request", (), {"timeout_s": 1.0}, "type of the reply"),
        ("stream", (Part,), {}, "timeout_s"),
        ("stream", (), {"timeout_s": 1.0}, "type of its frames"),
        ("request_many", (Told,), {}, "timeout_s"),
    ],
)
async def test_a_subject_without_what_a_declaration_brings_is_refused(
    client: Bus, method: str, arguments: tuple[Any, ...], more: dict[str, Any], missing: str
) -> None:
    with pytest.raises(LocalProtocolError, match=rf"bus\.{method} was given a subject and no {missing}"):
        await call(client, method, SUBJECT, Ask(), *arguments, **more)


@pytest.mark.parametrize(
    ("message", "why"),
    [
        (Ask(number=10**400), "serialize ints"),
        (Ask(anything=object()), "unsupported"),
        (Ask(anything="\ud800"), "surrogate"),
        ({"number": 1}, "no Message"),
    ],
)
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("request", Studio.shrink),
        ("stream", Studio.shrink_many),
        ("request_many", Studio.shrink),
        ("submit", Studio.archive),
        ("publish", SUBJECT),
    ],
)
async def test_a_message_that_can_not_be_encoded_is_the_caller_s_mistake(
    client: Bus, method: str, target: Any, message: Any, why: str
) -> None:
    with pytest.raises(LocalProtocolError, match=rf"(?i)({why}|is a Message, not dict)"):
        await call(client, method, target, message)


@pytest.mark.parametrize(
    ("target", "way"), [(Studio.shrink, r"await bus\.request\("), (Studio.shrink_many, r"async for .* bus\.stream\(")]
)
def test_an_endpoint_that_is_called_on_its_class_says_how_to_call_it(target: Any, way: str) -> None:
    with pytest.raises(TypeError, match=way):
        target(Ask())


async def test_a_type_checker_refuses_the_wrong_message_of_a_job(client: Bus) -> None:
    with pytest.raises(LocalProtocolError, match="takes Ask, not Told"):
        await client.submit(Studio.archive, Told())  # type: ignore[misc]


async def test_there_is_no_current_request_outside_of_a_handler() -> None:
    with pytest.raises(LocalProtocolError, match="no request is being worked on here"):
        current_request()
