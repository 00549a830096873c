"""FastStream in `benchmarks.bus`, both sides, run in an environment of its own (`make .venv-faststream/.ready`).

    python -m benchmarks.faststream_peer responder|client NATS_URL

Twice: at its fastest here, msgspec-msgpack through a decoder of ours, no parameter validation (`faststream`), and as
its tutorial has it, a pydantic model in JSON (`faststream_default`). Neither logs a line per message, which it would.
"""

import logging
import sys
import time
from importlib.metadata import version
from typing import Any

import msgspec
from faststream.nats import NatsBroker, NatsMessage
from pydantic import BaseModel

from benchmarks.participant import obey, run, timed
from benchmarks.record import Record, example

TIMEOUT_S = 10
MSGPACK, DEFAULT = "bench.faststream", "bench.faststream.default"

_DECODER = msgspec.msgpack.Decoder(Record)
_ENCODER = msgspec.msgpack.Encoder()


class BlockModel(BaseModel):
    """A block, as pydantic has it."""

    address: int
    num_bytes: int
    device: str


class RecordModel(BaseModel):
    """The record, as pydantic has it; the body is text, since JSON has no bytes."""

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
    blocks: list[BlockModel]
    body: str


async def decode_record(message: NatsMessage) -> Record:
    """msgspec instead of json and pydantic."""
    return _DECODER.decode(message.body)


def brokers(url: str) -> tuple[NatsBroker, NatsBroker]:
    """The fast one and the default one; both without a log line per message."""
    fast = NatsBroker(url, decoder=decode_record, apply_types=False, logger=None)
    return fast, NatsBroker(url, logger=None)


async def respond() -> None:
    """Serve both, then obey."""
    fast, default = brokers(sys.argv[2])

    @fast.subscriber(MSGPACK)  # type: ignore[untyped-decorator]
    async def echo(request: Record) -> bytes:
        return _ENCODER.encode(request)

    @default.subscriber(DEFAULT)  # type: ignore[untyped-decorator]
    async def echo_default(request: RecordModel) -> RecordModel:
        return request

    async with fast, default:
        await fast.start()
        await default.start()
        await obey({"processor_seconds": processor_seconds})


async def call() -> None:
    """Connect, then obey."""
    fast, default = brokers(sys.argv[2])
    record = example()
    plain = {**msgspec.to_builtins(record), "body": record.body.hex()[:480]}
    model = RecordModel.model_validate(plain)

    async def request() -> None:
        reply = await fast.request(_ENCODER.encode(record), MSGPACK, timeout=TIMEOUT_S)
        assert isinstance(await reply.decode(), Record)

    async def request_default() -> None:
        reply = await default.request(model, DEFAULT, timeout=TIMEOUT_S)
        RecordModel.model_validate(await reply.decode())

    calls = {"faststream": request, "faststream_default": request_default}

    async def many(system: str, count: int, concurrency: int) -> dict[str, Any]:
        return await timed(calls[system], count, concurrency)

    async def faststream_version() -> str:
        return version("faststream")

    async with fast, default:
        await fast.start()
        await default.start()
        await obey({"many": many, "processor_seconds": processor_seconds, "version": faststream_version})


async def processor_seconds() -> float:
    """The processor time of this process so far, in seconds."""
    return time.process_time()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    run(respond if sys.argv[1] == "responder" else call)
