"""One delivery on its way to being settled: whose turn it is, the handler, and what the server is told.

In: a delivery and its span. Out: exactly one of: acked after the handler (or because the job is done), given another
try after a pause, made a dead letter, or left to a later delivery.
Invariants: a job leaves the queue only when it is done or stored as a dead letter; nothing is said about a job that a
later delivery may have; what a claim can't be asked about comes again after ack_wait.
The first delivery of a job whose id is unique runs under its lease (`control_plane.lease`) and without a claim. When
the lease isn't sure any more, the handler makes a checkpoint, fails, or is stopped, the claim is made then.
Leaves out: whose a job is (`claims`), what failure means (`verdict`).
"""

import asyncio
import contextlib
import logging
import random
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from bus.control_plane.acks import TIMEOUT_S, Acks
from bus.control_plane.delivery import ACK, Delivery, nak, term
from bus.control_plane.jetstream import JetStream
from bus.control_plane.lease import Horizon, Lease, now_s
from bus.deadline import Deadline, working_under
from bus.errors import BusError, DeadlineExceeded, JobTakenOver, PermissionDenied
from bus.jobs.claims import Claims, Held
from bus.jobs.current import CurrentJob, no_checkpoint, working_on
from bus.jobs.dead_letters import DeadLetters
from bus.jobs.queue import JobQueueConfig, job_id_of
from bus.jobs.verdict import (
    HAND_BACK_DELAY_S,
    Bury,
    JobExpired,
    Standing,
    after_failure,
    attempts,
    needs_no_claim_at_first,
    pause_s,
)
from observability.active_span import Span
from observability.propagation import TRACEPARENT, extract, inject
from schemas.codec import Encoding, MessageError, decode, encoding_of
from schemas.fault import Fault, FaultCode
from schemas.message import Message
from schemas.protocol import PROTOCOL_HEADER, TTL_HEADER, WrongProtocol, check_protocol
from schemas.subjects import InvalidIdentifier, Subject

JobHandler = Callable[[Any], Awaitable[None]]

_ACK_PAUSE_S = 0.25
HAND_BACK_TIMEOUT_S = 2.0
_TTL_MS = re.compile("[0-9]{1,15}")
_LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class JobStats:
    """Counters of one queue in this worker, since it began."""

    num_done: int = 0
    num_skipped: int = 0
    """Deliveries of jobs that were done, or another's."""
    num_retried: int = 0
    num_dead: int = 0
    num_handed_back: int = 0
    num_lost_acks: int = 0
    """Acks that the server never confirmed; the job comes again."""


@dataclass(slots=True)
class Workplace:
    """What the deliveries of one queue share in one worker."""

    config: JobQueueConfig
    subject: Subject
    worker_id: str
    handler: JobHandler
    jetstream: JetStream
    claims: Claims
    dead_letters: DeadLetters
    stats: JobStats = field(default_factory=JobStats)
    horizon: Horizon = field(default_factory=Horizon)
    acks: Acks = field(init=False)
    slots: asyncio.Semaphore = field(init=False)
    ack_wait_s: float = field(init=False)
    """The consumer's, which may differ from the declared one."""

    def __post_init__(self) -> None:
        self.acks = Acks(self.jetstream)
        self.slots = asyncio.Semaphore(self.config.concurrency)
        self.ack_wait_s = self.config.ack_wait_s


class Settlement:
    """One delivery on its way to being settled; `settle` once."""

    def __init__(self, place: Workplace, delivery: Delivery, span: Span, lease: Lease) -> None:
        self._place = place
        self._config = place.config
        self._delivery = delivery
        self._span = span
        self._job_id = job_id_of(delivery.headers, delivery.stream_sequence, delivery.stored_at_ns)
        self._held: Held | None = None
        self._may_be_unclaimed = needs_no_claim_at_first(place.config, delivery)
        self._lease = lease if self._may_be_unclaimed and delivery.num_delivered == 1 else None
        """As long as there is no claim, and need be none."""
        self._has_returned = False

    async def settle(self) -> None:
        """Run the handler if it is this delivery's turn, and tell the server what became of it."""
        try:
            async with self._place.slots:  # never waits, but after a reconnect: see `pull`
                if await self._is_our_turn():
                    await self._run()
                    self._has_returned = True
                    await self._done()
        except (Exception, asyncio.CancelledError) as error:
            self._span.fail(error)
            if _is_being_cancelled(error):
                await self._hand_back()
            elif await self._is_still_ours(error):
                await self._failed(error)

    async def _is_our_turn(self) -> bool:
        """Claim the job. Whoever's it is instead, or that it came too often, is settled here."""
        if self._config.idempotent_handler or (self._lease and self._lease.is_sure):
            stands: Held | Standing = Standing.FREE
        else:
            self._lease = None
            try:
                stands = await self._claim()
            except BusError as error:  # no fault of the job's
                self._log(logging.WARNING, "can't be claimed now", error)
                await self._nak(pause_s(self._config, self._delivery.num_delivered))
                return False
        if isinstance(stands, Held):
            self._held = stands
            self._link_to_previous()
        elif stands is not Standing.FREE:
            self._place.stats.num_skipped += 1
            self._log(logging.INFO, f"is not run: its claim is {stands.value}")
            if stands not in (Standing.SUPERSEDED, Standing.SETTLED):
                await self._settled_by(ACK)
            return False
        if self._num_attempts > self._config.max_deliver:
            await self._bury(self._exhausted())
            return False
        return True

    @property
    def _num_attempts(self) -> int:
        return attempts(self._delivery, self._held.claim if self._held else None)

    async def _claim(
        self, *, has_begun: bool = False, state: Literal["working", "done"] = "working"
    ) -> Held | Standing:
        headers: dict[str, str] = {}
        inject(headers, self._span)
        return await self._place.claims.take(
            self._delivery,
            self._job_id,
            headers.get(TRACEPARENT, ""),
            was_unclaimed=self._may_be_unclaimed and not has_begun,
            has_begun=has_begun,
            state=state,
        )

    async def _claim_late(self, state: Literal["working", "done"] = "working") -> None:
        """Make the claim of a delivery that began without one. Raises `JobTakenOver`, and what a publish raises."""
        stands = await self._claim(has_begun=True, state=state)
        if not isinstance(stands, Held):
            raise JobTakenOver(f"job {self._job_id} was taken over by another delivery: its claim is {stands.value}")
        self._held, self._lease = stands, None

    async def _run(self) -> None:
        deadline, expires = self._deadline()
        message = self._decoded()
        working_on(
            CurrentJob(
                self._job_id,
                self._delivery.num_delivered,
                self._num_attempts,
                self._delivery.stream_sequence,
                self._place.jetstream.age_s(self._delivery.stored_at_ns),
                self._held.claim.progress if self._held else b"",
                no_checkpoint if self._config.idempotent_handler else self._checkpoint,
            )
        )
        try:
            with working_under(deadline):
                async with asyncio.timeout(deadline.remaining_s):
                    await self._place.handler(message)
        except TimeoutError:
            if not deadline.expired:
                raise
            if expires:
                raise JobExpired("the job's time was up while it ran") from None
            raise DeadlineExceeded(
                f"the job ran for more than {self._config.max_duration_s:g} s",
                remedy="raise the queue's max_duration_s, or make the job smaller",
            ) from None

    def _deadline(self) -> tuple[Deadline, bool]:
        """When this delivery must end, and whether the job's own time ends then. Raises `JobExpired`."""
        limit_s = self._config.max_duration_s
        ttl_ms = self._delivery.headers.get(TTL_HEADER, "")
        if not _TTL_MS.fullmatch(ttl_ms):
            return Deadline(time.monotonic() + limit_s), False
        left_s = int(ttl_ms) / 1000 - self._place.jetstream.age_s(self._delivery.stored_at_ns)
        if left_s <= 0:
            raise JobExpired(f"the job's time of {int(ttl_ms) / 1000:g} s was up before it ran")
        return Deadline(time.monotonic() + min(limit_s, left_s)), left_s <= limit_s

    def _decoded(self) -> Message:
        check_protocol(self._delivery.headers.get(PROTOCOL_HEADER), required=not self._config.public)
        payload = self._delivery.payload
        encoding = encoding_of(payload) if self._config.public else Encoding.MSGPACK
        message: Message = decode(payload, self._config.message_type, encoding)
        return message

    async def _checkpoint(self, progress: bytes) -> None:
        if self._held is None:
            await self._claim_late()
        assert self._held is not None
        await self._place.claims.update(self._held, progress=progress)

    async def _done(self) -> None:
        if self._lease:
            await self._settled_by(ACK)  # or it is another's, and not done by us
            self._place.stats.num_done += 1
            return
        self._place.stats.num_done += 1
        if self._config.idempotent_handler and self._place.jetstream.connection.is_connected:
            with contextlib.suppress(BusError):
                self._place.jetstream.connection.publish_now(self._delivery.ack_subject, ACK)
                return
        await self._settled_by(ACK, done=self._held)

    async def _failed(self, error: BaseException) -> None:
        worker_id = self._place.worker_id
        verdict = after_failure(self._config, error, self._num_attempts, worker_id, self._span.trace_id)
        if isinstance(verdict, Bury):
            self._log(logging.INFO, "is a dead letter", error)
            await self._bury(verdict.fault)
        else:
            self._place.stats.num_retried += 1
            self._log(logging.INFO, f"failed and comes again in {verdict.delay_s:.1f} s", error)
            await self._nak(verdict.delay_s)

    async def _is_still_ours(self, error: BaseException) -> bool:
        """Whether a failed delivery may say what becomes of the job: a later one may be at work on it by now."""
        try:
            if self._held and not isinstance(error, JobTakenOver):
                await self._place.claims.update(self._held)
            elif self._lease and not isinstance(error, JobTakenOver):
                await self._claim_late()
        except JobTakenOver as taken_over:
            error = taken_over
        except BusError as unknown:
            if self._lease and self._lease.is_sure:
                return True
            self._log(
                logging.WARNING, f"failed ({error}), and comes again after ack_wait: its claim is unknown", unknown
            )
            return False
        if isinstance(error, JobTakenOver):
            self._place.stats.num_skipped += 1
            self._log(logging.WARNING, "is left to a later delivery", error)
            return False
        return True

    async def _bury(self, fault: Fault) -> None:
        place = self._place
        num_attempts = min(self._num_attempts, self._config.max_deliver)
        try:
            await place.dead_letters.bury(self._delivery, fault, num_attempts, place.worker_id, self._span.trace_id)
        except Exception as error:  # a job that can't be buried must not come back at once, whatever the reason
            self._log(logging.ERROR, "can't be stored as a dead letter, and stays in its queue", error)
            await self._nak(self._config.backoff_s[-1])
            return
        place.stats.num_dead += 1
        await self._settled_by(term(fault.code))

    def _exhausted(self) -> Fault:
        return Fault(
            code=FaultCode.DELIVERIES_EXHAUSTED,
            message=f"{self._config.max_deliver} deliveries ended without a word: their workers died or were cut off",
            remedy="look for workers that die at this job, then 'nixlbus dlq replay'",
            worker_id=self._place.worker_id,
            trace_id=self._span.trace_id,
        )

    async def _hand_back(self) -> None:
        """Give the job to another worker, without a delivery's loss. The task is being cancelled, but has time."""
        self._place.stats.num_handed_back += 1
        try:
            async with asyncio.timeout(HAND_BACK_TIMEOUT_S):
                if self._lease:
                    await self._claim_late("done" if self._has_returned else "working")
                if self._has_returned:
                    return
                if self._held:
                    await self._place.claims.update(self._held, attempt=self._held.claim.attempt - 1)
        except JobTakenOver:
            return
        except (BusError, TimeoutError) as error:
            self._log(logging.INFO, "can't be given back now, and comes again after ack_wait", error)
            return
        await self._nak(random.uniform(*HAND_BACK_DELAY_S))  # noqa: S311

    async def _nak(self, delay_s: float) -> None:
        connection = self._place.jetstream.connection
        if not connection.is_connected:  # it would go out after the reconnect, when the job may be another's
            return
        try:
            connection.publish_now(self._delivery.ack_subject, nak(delay_s))
        except BusError as error:  # it comes again after ack_wait
            self._log(logging.INFO, "can't be given back now", error)

    async def _settled_by(self, word: bytes, done: Held | None = None) -> None:
        """Send `word` until the server confirms it, for as long as it would not deliver the job again anyway.

        With `done` that claim's end goes out before it, on the same connection. Without a claim, and when the lease
        isn't sure, "done" is claimed first: raises `JobTakenOver` if another delivery has the job.
        """
        give_up_s = time.monotonic() + self._place.ack_wait_s
        while True:
            try:
                if self._lease and not self._lease.is_sure:
                    await self._claim_late("done")
                if done:
                    self._place.claims.finish(done)
                said_s = now_s()
                if word is ACK:
                    await self._place.acks.confirm(self._delivery.ack_subject)
                else:
                    await self._place.jetstream.confirm(self._delivery.ack_subject, word, TIMEOUT_S)
                self._place.horizon.advance(said_s)
                return
            except JobTakenOver:
                raise
            except PermissionDenied as error:
                self._place.stats.num_lost_acks += 1
                self._log(logging.ERROR, "can't be acked", error)
                return
            except BusError as error:
                if time.monotonic() > give_up_s:
                    self._place.stats.num_lost_acks += 1
                    self._log(logging.WARNING, "was not acked, and comes again", error)
                    return
            await asyncio.sleep(_ACK_PAUSE_S)

    def _link_to_previous(self) -> None:
        """Link this delivery's span to the one before it."""
        if self._held and self._held.previous_traceparent:
            previous = extract({TRACEPARENT: self._held.previous_traceparent})
            if previous:
                self._span.link(previous)

    def _log(self, level: int, what: str, error: BaseException | None = None) -> None:
        expected = error is None or isinstance(error, (BusError, MessageError, WrongProtocol, InvalidIdentifier))
        _LOG.log(
            level if expected else logging.WARNING,
            "job %s of %s, delivery %d, %s%s",
            self._job_id,
            self._place.subject.template,
            self._delivery.num_delivered,
            what,
            f": {error}" if error else "",
            exc_info=None if expected else error,
        )


def _is_being_cancelled(error: BaseException) -> bool:
    """Whether the delivery's own task is to end: a handler may also meet the cancellation of what it waits for."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
