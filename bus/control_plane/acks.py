"""The acks of one consumer: those of one turn of the event loop, or of one round trip, are confirmed by one answer.

In: ack subjects. Out: each of the waiters hears that the server took its ack, or why not.
An ack never waits to be sent, only for its confirmation. Acks leave on one connection in their order, and a consumer
takes what is said to it in the order in which it comes (nats-server, `consumer.processInboundAcks`); so an answer to
the last word holds for all before it. Once an answer is out, acks are sent without asking for one; when it is here, an
`in_progress`, which is nothing to a message that is acked, asks for them all.
Leaves out: trying again (`bus.jobs.settlement`).
"""

import asyncio
from contextvars import Context

from bus.control_plane.delivery import ACK, IN_PROGRESS
from bus.control_plane.jetstream import JetStream

TIMEOUT_S = 5.0


class Acks:
    """What was acked, and who waits for it."""

    def __init__(self, jetstream: JetStream) -> None:
        self._jetstream = jetstream
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []
        self._confirming: asyncio.Task[None] | None = None

    async def confirm(self, ack_subject: str) -> None:
        """Ack, and wait until the server has taken it.

        Raises `ConnectionLost`, `PermissionDenied`, `DeadlineExceeded`, `NoResponders`: then it may have or not.
        """
        if self._waiting or self._confirming:
            self._jetstream.connection.publish_now(ack_subject, ACK)
        confirmed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((ack_subject, confirmed))
        if self._confirming is None:
            self._confirming = asyncio.create_task(self._confirm_all(), context=Context())  # at the end of this turn
        await confirmed

    async def _confirm_all(self) -> None:
        word = ACK  # of the one that began; all others are sent
        while self._waiting:
            batch, self._waiting = self._waiting, []
            subject = batch[0][0] if word is ACK else batch[-1][0]
            failed: Exception | None = None
            try:
                await self._jetstream.confirm(subject, word, TIMEOUT_S)
            except Exception as error:  # whatever it is, nobody waits for ever
                failed = error
            for _, confirmed in batch:
                if confirmed.done():  # its waiter was cancelled
                    continue
                if failed:
                    confirmed.set_exception(failed)
                else:
                    confirmed.set_result(None)
            word = IN_PROGRESS
        self._confirming = None
