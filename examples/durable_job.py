"""A durable job: stored by JetStream, done by whoever has room, and done though nobody worked when it was submitted.

python examples/durable_job.py       # a server, a caller that comes and goes, then a worker, in one process

One job fails at its first delivery and one is given up: `OSError: the disk is full`, as the log has it, is meant.
"""

import asyncio

from bus import Bus, BusConfig, FaultCode, Message, RequestRefused, current_job, embedded_server
from workers import Worker, job


class Transcode(Message, frozen=True, kw_only=True, tag="media.transcode"):
    film: str


class Transcoder(Worker):
    group = "media"

    def __init__(self, bus: Bus, num_jobs: int) -> None:
        super().__init__(bus)
        self.num_jobs = num_jobs
        self.all_done = asyncio.Event()
        self._done: set[str] = set()

    @job(concurrency=1, backoff_s=(0.1,))
    async def transcode(self, request: Transcode) -> None:
        this = current_job()
        if not request.film.endswith(".mov"):
            raise RequestRefused(FaultCode.UNSUPPORTED, f"{request.film} is no film")  # never again: a dead letter
        if request.film == "second.mov" and this.delivery_count == 1:
            raise OSError("the disk is full")  # another try, after a pause
        print(f"{this.job_id}: {request.film}, delivery {this.delivery_count}")
        self._done.add(this.job_id)
        if len(self._done) == self.num_jobs:
            self.all_done.set()


async def main() -> None:
    async with embedded_server() as server:

        def config(worker_id: str) -> BusConfig:
            return BusConfig(worker_id=worker_id, nats_url=server.url)

        async with Bus.open(config("caller"), data_plane=False) as bus:
            for film in ("first.mov", "a song", "second.mov"):
                await bus.submit(Transcoder.transcode, Transcode(film=film), job_id=f"film-{film[0]}")
            again = await bus.submit(Transcoder.transcode, Transcode(film="first.mov"), job_id="film-f")
            print("submitted twice, stored once:", again.duplicate)

        async with Transcoder.running(config("transcoder-1"), 2) as transcoder:
            await asyncio.wait_for(transcoder.all_done.wait(), 30)
            for letter in await transcoder.bus.dead_letters.list():
                print(f"{letter.job_id}: dead, {letter.code}")


if __name__ == "__main__":
    asyncio.run(main())
