"""`nixlbus demo`: the main job, from nothing to a trace.

In: a picture and a question (or the packaged ones). Out: the streamed answer, the ledger, the waterfall; with `--json`
one object with `text`, `trace_id`, `ledger` and `spans`. The request goes in through the HTTP frontend.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.text import Text

from bus import RemoteProtocolError
from observability.span_record import SpanRecord
from observability.waterfall import render_waterfall
from workers.cli.chat_client import stream_chat
from workers.cli.ledger_table import ledger_table
from workers.cli.output import Output
from workers.local_graph import LocalGraph, local_graph
from workers.models.packaged import digits_path
from workers.settings import Settings

PROMPT = "What digit is this?"
SAMPLE = "digit-7.png"
TRACE_TIMEOUT_S = 15.0


@dataclass
class Answer:
    """What came back."""

    text: str = ""
    trace_id: str = ""
    model: str = ""
    elapsed_ms: float = 0.0
    ledger: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)


async def run(
    images: Sequence[Path] | None, prompt: str | None, max_tokens: int, model: str | None, as_json: bool
) -> int:
    """Run the demo; returns the exit status."""
    output = Output(as_json)
    if prompt is None and images is None:
        images = [digits_path() / "samples" / SAMPLE]
    for image in images or ():
        image.stat()  # a missing file is an error before anything starts
    output.note("starting nats-server, a trace store and five workers")
    settings = Settings.from_env(http_port=0, otlp_port=0, model=model)
    async with local_graph(settings, on_progress=output.progress) as graph:
        answer = await _ask(graph, prompt or PROMPT, images or (), max_tokens, output)
        spans = await _spans(graph, answer.trace_id)
    output.text("\n", render_waterfall(spans))
    output.text("")
    output.table(ledger_table(answer.ledger, answer.elapsed_ms))
    output.result(
        {
            "text": answer.text,
            "trace_id": answer.trace_id,
            "model": answer.model,
            "usage": answer.usage,
            "elapsed_ms": answer.elapsed_ms,
            "ledger": answer.ledger,
            "spans": [span.to_dict() for span in spans],
        }
    )
    return 0


async def _ask(graph: LocalGraph, prompt: str, images: Sequence[Path], max_tokens: int, output: Output) -> Answer:
    pictures = "".join(f" [{image.name}]" for image in images)
    output.text(Text.assemble("\n", ("question", "bold"), f"{pictures} {prompt}"))
    output.text(Text.assemble(("answer", "bold"), "   "), end="")
    answer = Answer()
    async for event in stream_chat(graph.http_url, prompt, images, max_tokens):
        for choice in event["choices"]:
            piece = choice["delta"].get("content", "")
            answer.text += piece
            output.verbatim(piece, end="")
        answer.usage = event.get("usage", answer.usage)
        if "nixlbus" in event:
            answer.model = event["model"]
            answer.trace_id = event["nixlbus"]["trace_id"]
            answer.ledger = event["nixlbus"]["ledger"]
            answer.elapsed_ms = event["nixlbus"]["elapsed_ms"]
    output.text("")
    return answer


async def _spans(graph: LocalGraph, trace_id: str) -> list[SpanRecord]:
    if graph.store is None or not trace_id:
        raise RemoteProtocolError("the answer carried no trace id")
    await graph.store.wait_for_complete(trace_id, TRACE_TIMEOUT_S)
    return graph.store.trace(trace_id)
