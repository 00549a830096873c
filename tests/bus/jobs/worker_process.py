"""A worker of a queue in a process of its own, to be killed: `worker_process.py URL WORKER_ID QUEUE JOURNAL MODE`.

It writes a line to the journal when a job starts, one when its effect is made, and at its end how many it did and
skipped. MODE: `effect` does each job in a
moment; `die` kills its own process in every job; `fenced` asks whether
the job is still its own before the effect.
"""

import asyncio
import os
import signal
import sys

from bus import Bus, BusConfig, current_job
from tests.bus.jobs.queues import Task, queue


async def main(url: str, worker_id: str, name: str, journal: str, mode: str) -> None:
    def note(what: str) -> None:
        with open(journal, "a") as file:
            file.write(f"{what}\n")

    async def handler(task: Task) -> None:
        note(f"start {task.number} {worker_id} {current_job().delivery_count}")
        if mode == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        await asyncio.sleep(0.05)
        if mode == "fenced":
            await asyncio.sleep(0.3)
            await current_job().checkpoint()
        note(f"effect {task.number} {worker_id} {current_job().delivery_count}")

    async with Bus.open(BusConfig(worker_id=worker_id, nats_url=url), data_plane=False) as bus:
        print("ready", flush=True)
        consumer = await bus.work(queue(queue=name, concurrency=4, ack_wait_s=1.5, max_deliver=3), handler)
        await asyncio.to_thread(sys.stdin.read)
    note(f"end {consumer.stats.num_done} {worker_id} {consumer.stats.num_skipped}")


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
