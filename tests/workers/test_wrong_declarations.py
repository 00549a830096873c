"""What a class declares wrongly is refused before anything is served, by the name of the method."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from bus import BusConfig, EmbeddedServer, Message
from workers import Worker, endpoint, job, on_event


class Ask(Message, frozen=True, kw_only=True, tag="wrong.ask"):
    number: int = 0


class Told(Message, frozen=True, kw_only=True, tag="wrong.told"):
    number: int = 0


async def fine(self: Any, request: Ask) -> Told:
    return Told()


async def quiet(self: Any, request: Ask) -> None: ...


async def served(worker_type: type[Worker], server: EmbeddedServer) -> None:
    async with worker_type.running(BusConfig(worker_id="w", nats_url=server.url)):
        pass


@pytest.mark.parametrize("decorator", [endpoint, job, on_event])
def test_a_decorator_without_its_parentheses_is_refused(decorator: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=rf"Bare\.handle: @{decorator.__name__}\(.* is written with parentheses"):

        class Bare(Worker):
            @decorator
            async def handle(self, request: Ask) -> None: ...


@pytest.mark.parametrize("decorator", [endpoint(), job(), on_event("asked")])
def test_a_method_that_is_not_async_is_refused(decorator: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"Blocking\.handle is not declared with 'async def'"):

        class Blocking(Worker):
            @decorator
            def handle(self, request: Ask) -> None: ...


@pytest.mark.parametrize("decorator", [job(), on_event("asked")])
def test_only_an_endpoint_may_yield(decorator: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"Yielding\.handle yields, which only an @endpoint may"):

        class Yielding(Worker):
            @decorator
            async def handle(self, request: Ask) -> Any:
                yield


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        (endpoint("same")(fine), endpoint("same")(fine), r"graph\.doubled\.same"),
        (endpoint("same", queue_group="a")(fine), endpoint("same", queue_group="b")(fine), r"graph\.doubled\.same"),
        (endpoint("same", direct=True)(fine), endpoint("same", direct=True)(fine), r"worker\.\{worker_id\}\.same"),
        (job("same")(quiet), job("same")(quiet), r"job\.doubled\.same"),
    ],
)
async def test_two_of_one_subject_are_refused(nats: EmbeddedServer, first: Any, second: Any, what: str) -> None:
    class Doubled(Worker):
        one = first
        other = second

    with pytest.raises(TypeError, match=rf"Doubled\.\w+ and .*Doubled\.\w+ both listen on {what}"):
        await served(Doubled, nats)


async def test_a_direct_and_a_shared_endpoint_and_a_job_may_have_one_name(nats: EmbeddedServer) -> None:
    class Apart(Worker):
        one = endpoint("same")(fine)
        two = endpoint("same", direct=True)(fine)
        three = on_event("same")(quiet)
        four = on_event("same")(quiet)

    await served(Apart, nats)


@pytest.mark.parametrize(
    ("declaration", "what"),
    [
        (endpoint(timeout_s=-5)(fine), "-5 s"),
        (endpoint(timeout_s=0)(fine), "0 s"),
        (endpoint(concurrency=0)(fine), "concurrency=0"),
        (endpoint("two.parts")(fine), "two.parts"),
        (on_event("made", concurrency=0)(quiet), "concurrency=0"),
        (on_event("so made")(quiet), "so made"),
        (job(max_deliver=0)(quiet), "max_deliver=0"),
        (job("*")(quiet), "'\\*'"),
    ],
)
async def test_settings_that_can_not_be_used_are_refused_where_they_are_written(
    nats: EmbeddedServer, declaration: Any, what: str
) -> None:
    class Unusable(Worker):
        it = declaration

    name = declaration.method.__name__
    with pytest.raises(TypeError, match=rf"Unusable\.{name} can't be served: .*{what}"):
        await served(Unusable, nats)


async def test_a_class_that_declares_nothing_is_served_with_a_warning(
    nats: EmbeddedServer, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgotten(Worker):
        async def handle(self, request: Ask) -> Told:
            return Told()

    class Gateway(Worker):
        async def start(self) -> None:
            """What it does, it does here."""

    with caplog.at_level(logging.WARNING, "workers.worker"):
        await served(Gateway, nats)
        assert not caplog.records
        await served(Forgotten, nats)
    assert [record.getMessage().rpartition(".")[2] for record in caplog.records] == [
        "Forgotten serves nothing: it has no @endpoint, @job or @on_event"
    ]


class Handlers(Worker):
    """Its methods, as `mypy` sees them on an instance."""

    @endpoint()
    async def ask(self, request: Ask) -> Told:
        return Told(number=request.number + 1)

    @job()
    async def work(self, request: Ask) -> None: ...

    @on_event("asked")
    async def on_asked(self, event: Ask) -> None: ...


async def test_the_methods_of_an_instance_make_tasks(nats: EmbeddedServer) -> None:
    async with Handlers.running(BusConfig(worker_id="h", nats_url=nats.url)) as worker, asyncio.TaskGroup() as group:
        told = group.create_task(worker.ask(Ask(number=1)))
        group.create_task(worker.work(Ask()))
        group.create_task(worker.on_asked(Ask()))
        wrong = worker.work(Told())  # type: ignore[arg-type]
        group.create_task(wrong)
    assert told.result().number == 2
