"""Two stages that move tensors: Camera writes frames into memory that Detector grants; NATS carries the requests.

python examples/tensor_pipeline.py                     # a server, both workers and a caller in one process
cd examples && nixlbus run tensor_pipeline:Camera      # one of them alone; NIXLBUS_KEY_FILE is their shared key
"""

import asyncio
import tempfile
from pathlib import Path

import torch

from bus import Bus, BusConfig, Message, RdmaMetadata, embedded_server, write_key_file
from workers import Worker, endpoint

HEIGHT, WIDTH = 480, 640


class Capture(Message, frozen=True, kw_only=True, tag="vision.capture"):
    frame: int
    where: RdmaMetadata


class Captured(Message, frozen=True, kw_only=True, tag="vision.captured"):
    num_bytes: int


class Detect(Message, frozen=True, kw_only=True, tag="vision.detect"):
    frame: int


class Detected(Message, frozen=True, kw_only=True, tag="vision.detected"):
    row: int
    column: int
    moved_bytes: int


class Camera(Worker):
    """Stage one: makes a tensor."""

    group = "vision"
    needs_data_plane = True

    @endpoint()
    async def capture(self, request: Capture) -> Captured:
        with self.bus.arena.allocate([HEIGHT, WIDTH], torch.uint8) as picture:
            picture.tensor.zero_()
            picture.tensor[10 * request.frame, 20 * request.frame] = 255  # a bright spot that moves
            report = await (await self.bus.begin_write(request.where, picture))
        return Captured(num_bytes=report.transfer.num_bytes)


class Detector(Worker):
    """Stage two: grants the memory, waits for the bytes, works on them where they are."""

    group = "vision"
    needs_data_plane = True

    @endpoint()
    async def detect(self, request: Detect) -> Detected:
        with self.bus.arena.allocate([HEIGHT, WIDTH], torch.uint8) as picture:
            async with await self.bus.create_writable(picture) as writable:
                await self.bus.request(Camera.capture, Capture(frame=request.frame, where=writable.metadata))
                ack = await writable
            row, column = divmod(int(picture.tensor.argmax()), WIDTH)
        return Detected(row=row, column=column, moved_bytes=ack.num_bytes)


async def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        key = Path(folder, "key")
        write_key_file(key)
        async with embedded_server() as server:

            def config(worker_id: str) -> BusConfig:
                return BusConfig(worker_id=worker_id, nats_url=server.url, key_file=str(key))

            async with (
                Camera.running(config("camera-1")),
                Detector.running(config("detector-1")),
                Bus.open(config("caller"), data_plane=False) as bus,
            ):
                for frame in range(3):
                    found = await bus.request(Detector.detect, Detect(frame=frame))
                    print(f"frame {frame}: {found.moved_bytes} bytes, a spot at ({found.row}, {found.column})")


if __name__ == "__main__":
    asyncio.run(main())
