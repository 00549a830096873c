from collections.abc import AsyncGenerator
from typing import Any

import pytest

from schemas.message import Message
from workers.roles import GRAPH_ROLES, role_class, role_names
from workers.worker import Worker, declared_endpoints, endpoint, request_type


class Question(Message, frozen=True, kw_only=True, tag="test.question"):
    text: str


class Chatter(Worker):
    role = "chatter"

    @endpoint("talk", concurrency=3)
    async def talk(self, request: Question) -> AsyncGenerator[Question, None]:
        yield request

    @endpoint("whisper", direct=True)
    async def whisper(self, request: Question) -> Question:
        return request

    async def no_endpoint(self) -> None: ...


def test_endpoints_are_the_declared_methods_with_their_request_types() -> None:
    worker = Chatter.__new__(Chatter)
    declared = {declaration.stage: (declaration, method) for declaration, method in declared_endpoints(worker)}
    assert set(declared) == {"talk", "whisper"}
    assert declared["talk"][0].concurrency == 3
    assert declared["whisper"][0].direct
    assert all(request_type(method) is Question for _, method in declared.values())


def test_a_handler_whose_request_has_no_message_type_is_refused() -> None:
    async def untyped(request: Any) -> Any:
        return request

    async def two(request: Question, more: int) -> Any:
        return request, more

    for handler in (untyped, two):
        with pytest.raises(TypeError, match="annotated with a Message class"):
            request_type(handler)


def test_every_role_has_a_class_that_bears_its_name() -> None:
    assert set(GRAPH_ROLES) < set(role_names())
    assert all(role_class(name).role == name for name in role_names())
