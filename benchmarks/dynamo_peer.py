"""Paired operations of NVIDIA Dynamo's `dynamo.nixl_connect` between two processes: what nixlbus is measured against.

    .venv-dynamo/bin/python dynamo_benchmark.py [--quick]        (requirements.txt makes that environment)

Prints one line of JSON on stdout: {"version", "rows": [{"case", "size_bytes", "concurrency", "durations_s",
"wall_s"}]}. The parent is the target, a spawned child the initiator; RdmaMetadata travels as JSON, byte for byte what
Dynamo puts on the wire, over a Unix socket. An operation is timed from its creation until both sides are done with it.
Used as Dynamo uses it: one connector per process, a fresh descriptor per operation, uvloop. Each of the two agents
spins one core even when idle (its progress thread), so on a small machine they are in each other's way, and in the
way of whatever is measured beside them.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import resource
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

os.environ["NIXL_LOG_LEVEL"] = "WARN"
os.environ["UCX_LOG_FILE"] = "stderr"

import torch
import uvloop
from dynamo.nixl_connect import Connector, Descriptor, OperationKind, RdmaMetadata

SIZES = (4 << 10, 64 << 10, 1 << 20, 64 << 20)
CASES = [
    (kind, size_bytes, concurrency)
    for size_bytes, concurrency in (*((size, 1) for size in SIZES), (SIZES[0], 8), (SIZES[0], 32))
    for kind in (OperationKind.WRITE, OperationKind.READ)
]
LARGE_BYTES = 16 << 20
FILL = 7
BEGIN_LIMIT_S = 10.0
"""No operation of a case begins later than this after the case did."""
CASE_LIMIT_S = 20.0
"""nixl_connect has no timeout of its own: a case that has not ended by then fails the run."""
START_TIMEOUT_S = 60.0


def repetitions(size_bytes: int, concurrency: int, quick: bool) -> int:
    """Operations of a case: at least four for each that runs at a time."""
    few = 6 if size_bytes > LARGE_BYTES else max(30, 4 * concurrency)
    return few if quick else few * 4


@dataclass
class Initiator:
    """The child: writes or reads whatever it is told to, and says so."""

    target: asyncio.StreamWriter
    connector: Connector = field(default_factory=Connector)
    tensors: dict[tuple[int, int, int], torch.Tensor] = field(default_factory=dict)
    """By kind, size and slot, so that no two operations at a time share memory and none pays for page faults."""

    async def act(self, slot: int, metadata: RdmaMetadata) -> None:
        """Do one operation and answer, with the error if there was one."""
        try:
            await self.transfer(slot, metadata)
            answer: dict[str, Any] = {"slot": slot}
        except Exception as error:
            answer = {"slot": slot, "error": repr(error)}
        self.target.write(json.dumps(answer).encode() + b"\n")

    async def transfer(self, slot: int, metadata: RdmaMetadata) -> None:
        """Begin the operation and wait for it."""
        size_bytes = metadata.descriptors[0].size
        key = metadata.operation_kind, size_bytes, slot
        is_write = metadata.operation_kind == OperationKind.WRITE
        if key not in self.tensors:
            self.tensors[key] = torch.full([size_bytes], FILL if is_write else 0, dtype=torch.uint8)
        local = Descriptor(self.tensors[key])
        begin = self.connector.begin_write(local, metadata) if is_write else self.connector.begin_read(metadata, local)
        with await begin as operation:
            await operation.wait_for_completion()
        if not int(self.tensors[key][0]) == int(self.tensors[key][-1]) == FILL:
            raise RuntimeError("the operation is complete and its bytes are not there")


async def initiate(path: str) -> None:
    """Act on each line of the socket until it closes, all of them at a time."""
    orders, answers = await asyncio.open_unix_connection(path)
    initiator = Initiator(answers)
    async with asyncio.TaskGroup() as under_way:
        async for line in orders:
            order = json.loads(line)
            under_way.create_task(initiator.act(order["slot"], RdmaMetadata.model_validate_json(order["metadata"])))


def child(path: str) -> None:
    """Entry of the other process."""
    allow_many_sockets()
    uvloop.run(initiate(path))


@dataclass
class Target:
    """The parent: creates operations, sends their metadata and waits."""

    initiator: asyncio.StreamWriter
    connector: Connector = field(default_factory=Connector)
    done: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    """By slot: set when the initiator's side of the operation is."""

    async def listen(self, answers: asyncio.StreamReader) -> None:
        """Take the initiator's answers until it is gone."""
        async for line in answers:
            answer = json.loads(line)
            if "error" in answer:
                self.done[answer["slot"]].set_exception(RuntimeError(answer["error"]))
            else:
                self.done[answer["slot"]].set_result(None)

    async def operate(self, kind: OperationKind, tensor: torch.Tensor, slot: int) -> float:
        """One operation, from its creation until both sides are done; returns seconds."""
        self.done[slot] = asyncio.get_running_loop().create_future()
        started_s = time.perf_counter()
        is_write = kind is OperationKind.WRITE
        create = self.connector.create_writable if is_write else self.connector.create_readable
        with await create(Descriptor(tensor)) as operation:
            order = {"slot": slot, "metadata": operation.metadata().model_dump_json()}
            self.initiator.write(json.dumps(order).encode() + b"\n")
            await asyncio.gather(operation.wait_for_completion(), self.done[slot])
        return time.perf_counter() - started_s

    async def measure(self, kind: OperationKind, size_bytes: int, concurrency: int, count: int) -> dict[str, Any]:
        """One case, as a row. Raises TimeoutError if it hangs, RuntimeError if the initiator's side fails."""
        start = 0 if kind is OperationKind.WRITE else FILL
        tensors = [torch.full([size_bytes], start, dtype=torch.uint8) for _ in range(concurrency)]
        durations_s: list[float] = []
        started_s = time.perf_counter()

        async def runner(slot: int) -> None:
            for _ in range(count // concurrency):
                if time.perf_counter() - started_s > BEGIN_LIMIT_S:
                    break
                durations_s.append(await self.operate(kind, tensors[slot], slot))

        async with asyncio.timeout(CASE_LIMIT_S):
            await asyncio.gather(*(runner(slot) for slot in range(concurrency)))
        wall_s = time.perf_counter() - started_s
        if not all(bool((tensor == FILL).all()) for tensor in tensors):
            raise RuntimeError("the operation is complete and its bytes are not there")
        row = {"case": kind.name.lower(), "size_bytes": size_bytes, "concurrency": concurrency}
        return {**row, "durations_s": durations_s, "wall_s": wall_s}


async def measure_all(quick: bool) -> list[dict[str, Any]]:
    """Start the other process, meet it once, and measure every case."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "socket"))
        streams: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
        server = await asyncio.start_unix_server(lambda *pair: streams.put_nowait(pair), path)
        process = multiprocessing.get_context("spawn").Process(target=child, args=(path,), daemon=True)
        process.start()
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                answers, orders = await streams.get()
            target = Target(orders)
            listening = asyncio.create_task(target.listen(answers))
            await target.measure(OperationKind.WRITE, SIZES[0], 1, 2)
            rows = [
                await target.measure(kind, size_bytes, concurrency, repetitions(size_bytes, concurrency, quick))
                for kind, size_bytes, concurrency in CASES
            ]
            orders.close()
            await listening
        finally:
            server.close()
            process.terminate()
            process.join()
    return rows


def allow_many_sockets() -> None:
    """Raise the limit of open files: nixl_connect leaks a socket per operation, on both sides."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def run(quick: bool, results: TextIO) -> None:
    """Measure, and print the line."""
    allow_many_sockets()
    rows = uvloop.run(measure_all(quick))
    print(json.dumps({"rows": rows, "version": version("ai-dynamo-runtime")}), file=results, flush=True)


def main() -> None:
    """Keep stdout for the line (C++ code prints too, hence the descriptor and not `sys.stdout`), and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="30 operations per case, 6 of 64 MiB")
    arguments = parser.parse_args()
    with os.fdopen(os.dup(1), "w") as results:
        os.dup2(2, 1)
        run(arguments.quick, results)


if __name__ == "__main__":
    main()
