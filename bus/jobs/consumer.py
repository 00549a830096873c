"""The worker's side of a queue: takes deliveries, keeps them alive, settles each one.

In: deliveries of one queue, a handler. Out: each settled (`settlement`).
One task per delivery and one that speaks for all of them (`in_progress`) at a third of ack_wait; what a handler does
past `max_duration_s` is cancelled, and nobody speaks for it any more.
Invariants: never more deliveries are asked for than there are free slots; nothing here raises to the pull loop.
Leaves out: what becomes of a delivery (`settlement`), asking for deliveries (`control_plane.pull`).
"""

import asyncio
import contextlib
import logging
import time
from contextvars import Context
from dataclasses import dataclass, field

from bus.control_plane.delivery import IN_PROGRESS, Delivery
from bus.control_plane.lease import Lease, now_s
from bus.control_plane.listing import Listing, Load, Statistics
from bus.control_plane.pull import LONGEST_REQUEST_S, PullSubscription
from bus.errors import BusError, ConnectionLost
from bus.jobs.settlement import HAND_BACK_TIMEOUT_S, Settlement, Workplace
from bus.jobs.spans import process_span
from bus.jobs.streams import ConsumerSettings, Streams, ensure_consumer, ensure_stream

_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Active:
    delivery: Delivery
    lease: Lease
    since_s: float = field(default_factory=time.monotonic)


class JobConsumer:
    """One queue, worked on by this process; made by `Bus.work`."""

    def __init__(self, place: Workplace, streams: Streams) -> None:
        config = place.config
        self.config = config
        self.stats = place.stats
        self._place = place
        self._jetstream = place.jetstream
        self._streams = streams
        self._consumer = ConsumerSettings(
            streams.jobs.name,
            config.durable,
            place.subject,
            config.ack_wait_s,
            config.max_ack_pending,
            config.max_deliver,
        )
        self._active: dict[asyncio.Task[None], _Active] = {}
        self._in_hand: set[str] = set()
        self._pull = PullSubscription(
            place.jetstream.connection,
            self._consumer.name,
            self._free_slots,
            self._on_delivery,
            self._provision,
            place.horizon,
        )
        self._newest_sequence = 0
        """Of first deliveries, which come in the order of the stream."""
        place.jetstream.connection.on_loss(self._on_loss)
        self._speaking: asyncio.Task[None] | None = None

    async def open(self, timeout_s: float) -> None:
        """Make what is missing and begin. Raises `DurableWorkUnavailable`, `PermissionDenied`, `ConnectionLost`."""
        await self._provision()
        try:
            await self._pull.open(timeout_s)
        except BaseException:
            await self._pull.close()
            raise
        self._speaking = asyncio.create_task(self._speak(), context=Context())

    def listing(self) -> Listing:
        """What discovery tells of it."""
        config = self.config
        return Listing(
            name=config.queue,
            subject=self._place.subject.name,
            queue_group=config.durable,
            kind="job",
            request_type=config.message_type,
            concurrency=config.concurrency,
            timeout_s=config.max_duration_s,
            public=config.public,
        )

    def statistics(self) -> Statistics:
        """What discovery tells of its work: deliveries that were settled; a retry and a dead letter are errors."""
        stats = self.stats
        num_errors = stats.num_retried + stats.num_dead
        return Statistics(
            name=self.config.queue,
            subject=self._place.subject.name,
            queue_group=self.config.durable,
            num_requests=stats.num_done + stats.num_skipped + num_errors,
            num_errors=num_errors,
            data=Load(active=self.num_active),
        )

    @property
    def num_active(self) -> int:
        """Deliveries in hand."""
        return len(self._active)

    async def drain(self, timeout_s: float) -> None:
        """Ask for no more, finish what is in hand within `timeout_s`, give back the rest at once."""
        await self._pull.close()
        if self._active:
            await asyncio.wait(self._active, timeout=timeout_s)
        for task in list(self._active):
            task.cancel()
        if self._active:
            await asyncio.wait(self._active, timeout=2 * HAND_BACK_TIMEOUT_S)
        if self._speaking:
            self._speaking.cancel()
            await asyncio.gather(self._speaking, return_exceptions=True)
            self._speaking = None

    async def _provision(self) -> None:
        await ensure_stream(self._jetstream, self._streams.jobs)
        self._place.ack_wait_s = await ensure_consumer(self._jetstream, self._consumer)
        self._pull.request_s = min(LONGEST_REQUEST_S, self._place.ack_wait_s / 3)
        if self._place.ack_wait_s != self.config.ack_wait_s:
            _LOG.warning(
                "the queue %s has an ack_wait of %g s, not %g: it was made so, and 'nats consumer edit' changes it",
                self._place.subject.template,
                self._place.ack_wait_s,
                self.config.ack_wait_s,
            )

    def _free_slots(self) -> int:
        return self.config.concurrency - len(self._active)

    def _on_delivery(self, delivery: Delivery) -> None:
        if delivery.ack_subject in self._in_hand:
            return  # the same delivery on two connections, while one takes over from the other
        self._in_hand.add(delivery.ack_subject)
        lease = self._lease(delivery)
        task = asyncio.create_task(self._work(delivery, lease), context=Context())
        self._active[task] = _Active(delivery, lease)
        task.add_done_callback(self._on_settled)

    def _lease(self, delivery: Delivery) -> Lease:
        """What is known when it arrives: nothing of a first delivery that comes after a later one, as a copy does."""
        lease = Lease(self._place.horizon.at_s, self._place.ack_wait_s)
        if delivery.num_delivered == 1:
            if delivery.stream_sequence <= self._newest_sequence:
                lease.end()
            self._newest_sequence = max(self._newest_sequence, delivery.stream_sequence)
        return lease

    def _on_loss(self, error: BusError, _subject: str) -> None:
        if isinstance(error, ConnectionLost):
            for active in self._active.values():
                active.lease.end()

    def _on_settled(self, task: "asyncio.Task[None]") -> None:
        self._in_hand.discard(self._active.pop(task).delivery.ack_subject)
        self._pull.slot_freed()
        if not task.cancelled() and (error := task.exception()):
            _LOG.error("a delivery on %s was left unsettled", self._place.subject.template, exc_info=error)

    async def _speak(self) -> None:
        """Say that what is in hand is worked on. A blocked event loop says nothing, and its jobs go to others."""
        while True:
            started_s = time.monotonic()
            interval_s = self._place.ack_wait_s / 3
            with contextlib.suppress(BusError):
                await self._speak_for_all(interval_s)
            await asyncio.sleep(max(0.0, started_s + interval_s - time.monotonic()))

    async def _speak_for_all(self, timeout_s: float) -> None:
        """Only the last word is confirmed: a consumer takes what is said to it in its order."""
        oldest_s = time.monotonic() - self.config.max_duration_s
        spoken_for = [active for active in self._active.values() if active.since_s > oldest_s]
        if not spoken_for or not self._jetstream.connection.is_connected:
            return
        said_s = now_s()
        for active in spoken_for[:-1]:
            self._jetstream.connection.publish_now(active.delivery.ack_subject, IN_PROGRESS)
        await self._jetstream.confirm(spoken_for[-1].delivery.ack_subject, IN_PROGRESS, timeout_s)
        self._place.horizon.advance(said_s)
        for active in spoken_for:
            active.lease.renew(said_s)

    async def _work(self, delivery: Delivery, lease: Lease) -> None:
        with process_span(self._place.subject, delivery, self.config.durable, self._place.worker_id) as span:
            await Settlement(self._place, delivery, span, lease).settle()
