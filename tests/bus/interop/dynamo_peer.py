"""A peer that speaks NVIDIA Dynamo's `dynamo.nixl_connect`, driven by lines of JSON: what nixlbus interoperates with.

    .venv-dynamo/bin/python dynamo_peer.py        (requirements.txt makes that environment)

In: one command per line on stdin. Out: one answer per line on stdout, in the same order, and nothing else; all that
libraries print goes to stderr. A command that fails is answered by {"error": ...}, and the next one is read. The end
of stdin ends the program.

    {"do": "create_writable", "num_bytes": N}              -> {"operation", "metadata"}
    {"do": "create_readable", "num_bytes": N, "value": V}  -> {"operation", "metadata"}; V null: arange % 251
    {"do": "wait", "operation": id, "timeout_s": T}        -> {"status", "sum", "is_arange"}; may be repeated
    {"do": "begin_write", "metadata": M, "fill": F}        -> {"status"}; F is "arange" or a byte's value
    {"do": "begin_read", "metadata": M}                    -> {"status", "sum", "is_arange"}

`metadata` is a string: Dynamo's RdmaMetadata as JSON, byte for byte what Dynamo puts on the wire. `sum` and
`is_arange` speak of the operation's bytes in the order of its descriptors. Memory is torch uint8 on the CPU.
"""

import asyncio
import json
import os
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TextIO

os.environ["NIXL_LOG_LEVEL"] = "WARN"
os.environ["UCX_LOG_FILE"] = "stderr"

import torch
from dynamo.nixl_connect import (
    Connector,
    Descriptor,
    RdmaMetadata,
    ReadableOperation,
    ReadOperation,
    WritableOperation,
    WriteOperation,
)

ARANGE_MODULUS = 251
"""A prime below 256: no power of two in the pattern, so a piece put at a wrong offset shows."""
ACTIVE_TIMEOUT_S = 30.0
"""nixl_connect has no timeout of its own."""

Command = dict[str, Any]
Answer = dict[str, Any]


def filled(num_bytes: int, value: int | None) -> torch.Tensor:
    """Bytes that all are `value`, or count up modulo 251."""
    if value is None:
        return torch.arange(ARANGE_MODULUS, dtype=torch.uint8).repeat(num_bytes // ARANGE_MODULUS + 1)[:num_bytes]
    return torch.full([num_bytes], value, dtype=torch.uint8)


def seen(tensor: torch.Tensor) -> Answer:
    """What the bytes are, in two figures."""
    return {
        "sum": int(tensor.sum(dtype=torch.int64)),
        "is_arange": torch.equal(tensor, filled(tensor.numel(), None)),
    }


def pieces(tensor: torch.Tensor, metadata: RdmaMetadata) -> list[Descriptor]:
    """The tensor cut as the remote's memory is: nixl_connect wants as many descriptors, of the same sizes."""
    return [Descriptor(piece) for piece in tensor.split_with_sizes([remote.size for remote in metadata.descriptors])]


async def finish(operation: ReadOperation | WriteOperation, timeout_s: float) -> str:
    """Post an operation that this side initiates, and see it through; returns its status."""
    with operation:
        async with asyncio.timeout(timeout_s):
            await operation.wait_for_completion()
        status: str = operation.status.name
        return status


@dataclass
class Peer:
    """One connector, hence one NIXL agent, and the operations that wait for their remote."""

    connector: Connector = field(default_factory=Connector)
    waiting: dict[str, tuple[WritableOperation | ReadableOperation, torch.Tensor]] = field(default_factory=dict)
    num_created: int = 0

    async def create_writable(self, command: Command) -> Answer:
        """Memory that a remote may write, zeros until then."""
        tensor = filled(command["num_bytes"], 0)
        return self.created(await self.connector.create_writable(Descriptor(tensor)), tensor)

    async def create_readable(self, command: Command) -> Answer:
        """Memory that a remote may read."""
        tensor = filled(command["num_bytes"], command.get("value"))
        return self.created(await self.connector.create_readable(Descriptor(tensor)), tensor)

    def created(self, operation: WritableOperation | ReadableOperation, tensor: torch.Tensor) -> Answer:
        """Keep the operation for `wait`, and say what its remote must know."""
        self.num_created += 1
        name = str(self.num_created)
        self.waiting[name] = (operation, tensor)
        return {"operation": name, "metadata": operation.metadata().model_dump_json()}

    async def wait(self, command: Command) -> Answer:
        """Until the remote is done; then the memory is deregistered."""
        operation, tensor = self.waiting[command["operation"]]
        async with asyncio.timeout(command["timeout_s"]):
            await operation.wait_for_completion()
        del self.waiting[command["operation"]]
        with operation:
            return {"status": operation.status.name, **seen(tensor)}

    async def begin_write(self, command: Command) -> Answer:
        """Write the pattern into all the memory that the metadata describes."""
        metadata = RdmaMetadata.model_validate_json(command["metadata"])
        fill = command.get("fill", "arange")
        tensor = filled(sum(remote.size for remote in metadata.descriptors), None if fill == "arange" else fill)
        operation = await self.connector.begin_write(pieces(tensor, metadata), metadata)
        return {"status": await finish(operation, command.get("timeout_s", ACTIVE_TIMEOUT_S))}

    async def begin_read(self, command: Command) -> Answer:
        """Read all the memory that the metadata describes."""
        metadata = RdmaMetadata.model_validate_json(command["metadata"])
        tensor = filled(sum(remote.size for remote in metadata.descriptors), 0)
        operation = await self.connector.begin_read(metadata, pieces(tensor, metadata))
        return {"status": await finish(operation, command.get("timeout_s", ACTIVE_TIMEOUT_S)), **seen(tensor)}


async def answer_to(line: str, commands: Mapping[str, Callable[[Command], Awaitable[Answer]]]) -> Answer:
    """Do what one line asks; whatever goes wrong is an answer too."""
    try:
        command = json.loads(line)
        return await commands[command["do"]](command)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


async def serve(answers: TextIO) -> None:
    """Answer every line of stdin, one at a time: reading blocks the loop, on which nothing else runs."""
    peer = Peer()
    commands = {
        each.__name__: each
        for each in (peer.create_writable, peer.create_readable, peer.wait, peer.begin_write, peer.begin_read)
    }
    for line in sys.stdin:
        print(json.dumps(await answer_to(line, commands)), file=answers, flush=True)


def main() -> None:
    """Keep stdout for the answers (C++ code prints too, hence the descriptor and not `sys.stdout`), and serve."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        asyncio.run(serve(answers))


if __name__ == "__main__":
    main()
