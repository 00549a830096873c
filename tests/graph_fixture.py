"""A whole graph for tests: `nixlbus up` as a user runs it, once per test session, five worker processes and all.

Tests share it, so each leaves it as it was: what must break something starts its own.
"""

import base64
import json
import os
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bus import Bus, BusConfig
from schemas.generate import ChatMessage, GenerateChunk, GenerateDone, GenerateRequest, ImagePart, TextPart

SAMPLES = Path(__file__).parent.parent / "workers" / "models" / "digits" / "samples"
NIXLBUS = str(Path(sys.executable).with_name("nixlbus"))
START_TIMEOUT_S = 90
STOP_TIMEOUT_S = 30


@dataclass(frozen=True)
class RunningGraph:
    """Where the graph is."""

    nats_url: str
    monitoring_url: str
    http_url: str
    key_file: str
    workers: list[dict[str, Any]]

    def counted_bytes(self) -> int:
        """Bytes that nats-server received and sent, as it counts them."""
        with urllib.request.urlopen(f"{self.monitoring_url}/varz", timeout=5) as response:
            statistics = json.load(response)
        return int(statistics["in_bytes"]) + int(statistics["out_bytes"])

    def worker_pids(self) -> dict[str, int]:
        return {worker["role"]: worker["pid"] for worker in self.workers}


@dataclass(frozen=True)
class Answer:
    """A streamed answer, put together."""

    text: str
    token_ids: list[int]
    done: GenerateDone


def environment(**variables: str) -> dict[str, str]:
    """The environment of a child process: ours without what would configure it, plus `variables`."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIXLBUS_", "OTEL_", "UCX_"))}
    return {**inherited, "COLUMNS": "120", **variables}


@pytest.fixture(scope="session")
def graph() -> Iterator[RunningGraph]:
    with tempfile.TemporaryDirectory() as state, Path(state, "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [NIXLBUS, "up", "--json", "--nats-port", "0", "--http-port", "0", "--otlp-port", "0"],
            env=environment(XDG_STATE_HOME=state),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                errors.seek(0)
                raise AssertionError(f"nixlbus up did not start:\n{errors.read()}")
            ready = json.loads(line)
            del ready["otlp_endpoint"]
            yield RunningGraph(**ready)
            assert process.poll() is None, "the graph ended during the tests"
        finally:
            os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            status = process.wait(STOP_TIMEOUT_S)
            process.stdout.close()  # type: ignore[union-attr]
    assert status == 0, "Ctrl-C did not drain the graph cleanly"


async def ask(
    bus: Bus, prompt: str | list[ChatMessage], images: list[bytes] | None = None, *, graph: str = "vlm", **fields: Any
) -> Answer:
    """Ask over the bus and put the answer together. Raises what the stream raises."""
    messages = prompt if isinstance(prompt, list) else [user(prompt, *(images or []))]
    request = GenerateRequest(messages=messages, **fields)
    text = ""
    token_ids: list[int] = []
    frames = bus.stream(bus.subjects.graph(graph, "generate"), request, GenerateChunk, GenerateDone, timeout_s=30)
    async for frame in frames:
        if isinstance(frame, GenerateDone):
            return Answer(text, token_ids, frame)
        text += frame.text
        token_ids += frame.token_ids
    raise AssertionError("the stream ended without its last frame")


def user(text: str, *images: bytes) -> ChatMessage:
    """A turn of the user."""
    return ChatMessage(role="user", content=[*(ImagePart(image=image) for image in images), TextPart(text=text)])


def client_config(graph: RunningGraph) -> BusConfig:
    """The configuration of a client of the graph."""
    return BusConfig(worker_id="test-client", nats_url=graph.nats_url)


def sample(digit: int) -> bytes:
    """A packaged picture of a digit."""
    return (SAMPLES / f"digit-{digit}.png").read_bytes()


def image_turn(digit: int) -> dict[str, Any]:
    """A turn with a packaged picture, as OpenAI's API has it."""
    url = "data:image/png;base64," + base64.b64encode(sample(digit)).decode()
    return {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What digit is this?"}],
    }


def post(url: str, body: object) -> tuple[int, dict[str, str], bytes]:
    """POST a chat completion; returns status, headers and body."""
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=body if isinstance(body, bytes) else json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), error.read()


def run_cli(*arguments: str, timeout_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `nixlbus` as a user does."""
    return subprocess.run(
        [NIXLBUS, *arguments],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def json_of(finished: subprocess.CompletedProcess[str]) -> Any:
    """The one JSON object that a command printed on stdout."""
    return msgspec.json.decode(finished.stdout.encode())
