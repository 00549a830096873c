import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import RequestRefused
from schemas.fault import Fault
from schemas.generate import ChatMessage, GenerateDone, Hop, ImagePart, TextPart, Usage
from workers import openai_api

DONE = GenerateDone(
    seq=3,
    finish_reason="stop",
    model="digits",
    usage=Usage(prompt_tokens=25, completion_tokens=7),
    ledger=[Hop(name="decode", bytes=0, ms=1.5)],
    elapsed_ms=1.5,
    request_id="r",
    trace_id="0" * 32,
)


def generate_request(body: Any) -> Any:
    return openai_api.to_generate_request(openai_api.parse(json.dumps(body).encode()))


def test_text_and_images_keep_their_order() -> None:
    url = "data:image/png;base64," + base64.b64encode(b"picture").decode()
    request = generate_request(
        {
            "model": "digits",
            "messages": [
                {"role": "developer", "content": "be brief"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "before"},
                        {"type": "image_url", "image_url": {"url": url, "detail": "low"}},
                        {"type": "text", "text": "after"},
                    ],
                },
            ],
            "max_completion_tokens": 5,
            "max_tokens": 9,
        }
    )
    assert request.max_tokens == 5
    assert request.messages == [
        ChatMessage(role="system", content="be brief"),
        ChatMessage(
            role="user", content=[TextPart(text="before"), ImagePart(image=b"picture"), TextPart(text="after")]
        ),
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"messages": "hello"},
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"n": 2},
        {"temperature": 1},
        {"stop": ["x"]},
        {"max_tokens": -1},
        {"max_tokens": 0},
    ],
)
def test_what_can_not_be_honoured_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestRefused):
        generate_request({"messages": [{"role": "user", "content": "hi"}], **change})


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1/x.png", "file:///etc/passwd", "data:text/html;base64,aGk=", "data:,"]
)
def test_a_url_that_is_no_image_s_data_is_refused(url: str) -> None:
    with pytest.raises(RequestRefused, match="data:image"):
        openai_api.image_from_url(url)


@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_any_body_is_a_request_or_a_refusal(body: bytes) -> None:
    with contextlib.suppress(RequestRefused):
        openai_api.to_generate_request(openai_api.parse(body))


def test_responses_have_openai_s_fields() -> None:
    whole = openai_api.completion("id", "seven", DONE)
    assert whole["object"] == "chat.completion"
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": "seven"}
    assert whole["usage"] == {"prompt_tokens": 25, "completion_tokens": 7, "total_tokens": 32}
    assert whole["nixlbus"]["trace_id"] == "0" * 32
    assert openai_api.usage_chunk("id", DONE)["choices"] == []


def test_a_fault_is_an_error_object_of_the_right_kind() -> None:
    error = openai_api.error_object(Fault(code="overloaded", message="full", remedy="wait"))["error"]
    assert (error["type"], error["code"], error["message"]) == ("server_error", "overloaded", "full; wait")
    bad_image = Fault(code="invalid_image", message="no")
    assert openai_api.error_object(bad_image)["error"]["type"] == "invalid_request_error"
