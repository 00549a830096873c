"""`nixlbus request`: publish a request to a graph's subject on any server and stream the answer.

It is a client as anybody's: it listens to nothing but its own replies. With tracing configured (OTEL_* variables) its
span is the trace's root.
"""

from collections.abc import Sequence
from contextlib import aclosing
from pathlib import Path

import msgspec

from bus import Bus
from observability import tracing
from schemas.generate import ChatMessage, GenerateChunk, GenerateDone, GenerateRequest, ImagePart, TextPart
from workers.cli.client import open_client
from workers.cli.ledger_table import ledger_table
from workers.cli.output import Output
from workers.settings import Settings
from workers.worker import package_version


async def run(
    prompt: str,
    images: Sequence[Path] | None,
    max_tokens: int,
    timeout_s: float,
    nats: str | None,
    graph: str | None,
    as_json: bool,
) -> int:
    """Ask and print; returns the exit status."""
    output = Output(as_json)
    settings = Settings.from_env(graph=graph)
    client = open_client("client", nats)
    parts: list[TextPart | ImagePart] = [ImagePart(image=image.read_bytes()) for image in images or ()]
    message = GenerateRequest(
        messages=[ChatMessage(role="user", content=[*parts, TextPart(text=prompt)])], max_tokens=max_tokens
    )
    tracing.configure("client", instance_id="client", service_version=package_version())
    try:
        async with client as bus:
            await _ask(bus, settings.graph, message, timeout_s, output)
    finally:
        tracing.shutdown()
    return 0


async def _ask(bus: Bus, graph: str, message: GenerateRequest, timeout_s: float, output: Output) -> None:
    text, done = "", None
    subject = bus.subjects.graph(graph, "generate")
    frames = bus.stream(subject, message, GenerateChunk, GenerateDone, timeout_s=timeout_s)
    async with aclosing(frames):
        async for frame in frames:
            if isinstance(frame, GenerateChunk):
                text += frame.text
                output.verbatim(frame.text, end="")
            else:
                done = frame
    assert done is not None  # the stream ends with it, or raises
    output.text("")
    output.note(f"trace {done.trace_id or 'not recorded'}")
    output.table(ledger_table(msgspec.to_builtins(done.ledger), done.elapsed_ms))
    output.result({"text": text, **msgspec.to_builtins(done)})
