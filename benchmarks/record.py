"""The message that the systems of `benchmarks.bus` exchange: twenty fields, a nested list, 1.1 KB as msgpack.

Imports nothing but msgspec and `schemas`, so that a peer's own environment can use it too.
"""

import random

from schemas.message import Message, Part


class Block(Part, frozen=True):
    """A piece of memory somewhere."""

    address: int
    num_bytes: int
    device: str


class Record(Message, frozen=True, kw_only=True, tag="bench.record"):
    """What is asked, and answered unchanged."""

    request_id: str
    model: str
    tenant: str
    worker_id: str
    epoch: str
    region: str
    priority: int
    created_ns: int
    max_tokens: int
    num_tokens: int
    sequence: int
    attempt: int
    temperature: float
    top_p: float
    is_streaming: bool
    is_cached: bool
    stop: list[str]
    weights: list[float]
    blocks: list[Block]
    body: bytes


def example() -> Record:
    """The one record of every run."""
    return Record(
        request_id="4f9c1f3a7d7e4a5b",
        model="digits-llava",
        tenant="tenant-a",
        worker_id="encode-ab12cd",
        epoch="0123456789abcdef",
        region="arena-0",
        priority=5,
        created_ns=1_790_000_000_000_000_000,
        max_tokens=256,
        num_tokens=1311,
        sequence=17,
        attempt=1,
        temperature=0.7,
        top_p=0.95,
        is_streaming=True,
        is_cached=True,
        stop=["</s>", "\n\n"],
        weights=[0.25, 0.5, 0.125, 0.125],
        blocks=[Block(0x7F00_0000_0000 + (n << 20), 1 << 20, "cuda:0") for n in range(8)],
        body=random.Random(7).randbytes(360),
    )
