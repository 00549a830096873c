"""A useful worker in thirty lines: makes pictures small, for whoever asks on NATS.

python examples/plain_service.py                          # a server, the worker and a caller in one process
cd examples && nixlbus run plain_service:Thumbnails       # the worker alone, on the server at NIXLBUS_NATS_URL
"""

import asyncio
from io import BytesIO

from PIL import Image, UnidentifiedImageError

from bus import Bus, BusConfig, FaultCode, Message, RemoteFault, RequestRefused, embedded_server
from workers import Worker, endpoint


class Shrink(Message, frozen=True, kw_only=True, tag="thumbnails.shrink"):
    image: bytes
    max_pixels: int = 128


class Shrunk(Message, frozen=True, kw_only=True, tag="thumbnails.shrunk"):
    image: bytes
    width: int
    height: int


class Thumbnails(Worker):
    @endpoint(concurrency=2, max_queued=64, timeout_s=5)
    async def shrink(self, request: Shrink) -> Shrunk:
        """Two at once, 64 wait, and one more is told when to come back."""
        return await asyncio.to_thread(shrink, request)


def shrink(request: Shrink) -> Shrunk:
    try:
        picture = Image.open(BytesIO(request.image))
        picture.thumbnail((request.max_pixels, request.max_pixels))
    except (UnidentifiedImageError, OSError):
        raise RequestRefused(FaultCode.INVALID_IMAGE, "this is no picture", remedy="send PNG, JPEG or WebP") from None
    small = BytesIO()
    picture.save(small, "PNG")
    return Shrunk(image=small.getvalue(), width=picture.width, height=picture.height)


async def main() -> None:
    large = BytesIO()
    Image.new("RGB", (1600, 900), "teal").save(large, "PNG")
    async with (
        embedded_server() as server,
        Thumbnails.running(BusConfig(worker_id="thumbnails-1", nats_url=server.url)),
        Bus.open(BusConfig(worker_id="caller", nats_url=server.url), data_plane=False) as bus,
    ):
        small = await bus.request(Thumbnails.shrink, Shrink(image=large.getvalue()))
        print(f"{small.width} x {small.height}")
        try:
            await bus.request(Thumbnails.shrink, Shrink(image=b"a song"))
        except RemoteFault as refused:
            print(f"{refused.fault.code}: {refused.what}; {refused.remedy}")


if __name__ == "__main__":
    asyncio.run(main())
