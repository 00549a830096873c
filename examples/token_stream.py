"""A stream: tokens as they are made, at the pace of whoever reads, and no longer than somebody reads.

python examples/token_stream.py                     # a server, the worker and two callers in one process
cd examples && nixlbus run token_stream:Storyteller
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from bus import Bus, BusConfig, Frame, LastFrame, Message, embedded_server
from workers import Worker, endpoint

STORY = ["Once", "upon", "a", "time", "there", "was", "a", "token", "that", "came", "after", "another", "token"]


class Tell(Message, frozen=True, kw_only=True, tag="story.tell"):
    num_tokens: int


class Token(Frame, frozen=True, kw_only=True, tag="story.token"):
    text: str


class Told(LastFrame, frozen=True, kw_only=True, tag="story.told"):
    num_tokens: int


class Storyteller(Worker):
    group = "story"

    def __init__(self, bus: Bus) -> None:
        super().__init__(bus)
        self.ended = asyncio.Event()

    @endpoint(timeout_s=30)
    async def tell(self, request: Tell) -> AsyncGenerator[Token | Told, None]:
        try:
            for number in range(request.num_tokens):
                await asyncio.sleep(0.001)  # the model
                yield Token(text=STORY[number % len(STORY)])
            yield Told(num_tokens=request.num_tokens)
        finally:
            self.ended.set()  # also when nobody reads any further


async def main() -> None:
    async with (
        embedded_server() as server,
        Storyteller.running(BusConfig(worker_id="storyteller-1", nats_url=server.url)) as storyteller,
        Bus.open(BusConfig(worker_id="reader", nats_url=server.url), data_plane=False) as bus,
    ):
        async for frame in bus.stream(Storyteller.tell, Tell(num_tokens=6)):
            print(frame.text if isinstance(frame, Token) else f"({frame.num_tokens} tokens)", end=" ")
        print()

        storyteller.ended.clear()
        async with aclosing(bus.stream(Storyteller.tell, Tell(num_tokens=1_000_000), window_frames=16)) as frames:
            async for frame in frames:
                if frame.seq == 2:
                    break
        await asyncio.wait_for(storyteller.ended.wait(), 10)
        print("the reader left after 3 frames, and the storyteller stopped")


if __name__ == "__main__":
    asyncio.run(main())
