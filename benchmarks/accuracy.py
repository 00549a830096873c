"""The held-out digits through the whole graph: how many of 360 answers are exactly right.

    python -m benchmarks.accuracy [--json FILE]

Each image goes in as a request on the graph's subject and crosses every process border; the model never saw any of
them in training (workers/models/digits/README.md says how they were split off).
"""

import argparse
import asyncio
import json
import re
import sys
import time
from pathlib import Path

import uvloop
from rich.console import Console

from bus import Bus, BusConfig
from schemas.generate import ChatMessage, GenerateChunk, GenerateRequest, ImagePart, TextPart
from schemas.generate import GenerateDone as Done
from workers.local_graph import local_graph
from workers.models.digits_dataset import held_out_pngs
from workers.settings import Settings

QUESTION = "What digit is this?"
CONCURRENCY = 16
LIMIT = 0.97


async def evaluate(nats_url: str) -> tuple[int, int]:
    """Ask about every held-out image; returns how many answers were right, and how many there were."""
    pictures = held_out_pngs()
    slots = asyncio.Semaphore(CONCURRENCY)
    async with Bus.open(BusConfig(worker_id="evaluation", nats_url=nats_url), data_plane=False) as bus:

        async def is_right(png: bytes, label: int) -> bool:
            async with slots:
                return re.sub(r"\D", "", await answer_to(bus, png)) == str(label)

        right = await asyncio.gather(*(is_right(png, label) for png, label in pictures))
    return sum(right), len(right)


async def answer_to(bus: Bus, png: bytes) -> str:
    """The graph's answer to the question about one image."""
    content: list[TextPart | ImagePart] = [ImagePart(image=png), TextPart(text=QUESTION)]
    request = GenerateRequest(messages=[ChatMessage(role="user", content=content)])
    subject = bus.subjects.graph("vlm", "generate")
    text = ""
    async for frame in bus.stream(subject, request, GenerateChunk, Done, timeout_s=60):
        text += frame.text if isinstance(frame, GenerateChunk) else ""
    return text


async def run() -> tuple[int, int]:
    """Start a graph, evaluate, and say so; returns right answers and all."""
    async with local_graph(Settings.from_env(http_port=0, otlp_port=0), otlp_endpoint="") as graph:
        started_s = time.perf_counter()
        right, total = await evaluate(graph.nats_url)
        seconds = time.perf_counter() - started_s
    share = right / total
    Console(highlight=False).print(
        f"{right} of {total} held-out images right: {share:.2%} (limit {LIMIT:.0%}), {seconds:.1f} s"
    )
    return right, total


def main() -> None:
    """Run it; the exit status is 1 below the limit."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", type=Path)
    json_file: Path | None = arguments.parse_args().json
    right, total = uvloop.run(run())
    share = right / total
    if json_file:
        check = {"name": "held_out_share", "value": share, "limit": LIMIT, "better": "higher", "ok": share >= LIMIT}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"benchmark": "accuracy", "right": right, "total": total, "checks": [check]}))
    sys.exit(share < LIMIT)


if __name__ == "__main__":
    main()
