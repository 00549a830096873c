"""Who works on a job: a value in a KV bucket, written by compare-and-set.

In: a delivery. Out: the job is ours to run (`Held`), or a `Standing` that says why not.
What lets a delivery take over from another one is the delivery itself: JetStream delivers a message again only when its
worker was silent for ack_wait (a live one speaks at a third of it) or gave it back. The revision settles the rest: of
two that take over, one wins; a worker that was cut off, and comes back, can't write to the claim any more.
Another message of the same job id (submitted again after the duplicate window) is a duplicate while the first one is
in the stream, and takes over when that is gone without being done.
The first delivery of a job whose id nobody else can have begins without a claim (`settlement`), and makes one when it
must prove that the job is its own. So where such a job has none, a later delivery presumes one try, and looks whether
the job is still there.
"""

import contextlib
import hashlib
from dataclasses import dataclass
from typing import Literal

import msgspec

from bus.control_plane.delivery import Delivery
from bus.control_plane.jetstream import JetStream, NoStream, WrongSequence
from bus.errors import JobTakenOver, PermissionDenied
from bus.jobs.queue import claim_name
from bus.jobs.streams import Streams, ensure_stream
from bus.jobs.verdict import Standing, standing
from schemas.codec import MessageError, decode, encode
from schemas.jobs import JobClaim

EXPECTED_SEQUENCE_HEADER = "Nats-Expected-Last-Subject-Sequence"
_MAX_TRIES = 5


@dataclass(slots=True)
class Held:
    """A claim that is ours, at its last revision."""

    key: str
    claim: JobClaim
    revision: int
    previous_traceparent: str = ""
    """The span of the delivery that had it before."""


class Claims:
    """The claims of one worker."""

    def __init__(self, jetstream: JetStream, streams: Streams, worker_id: str, epoch: str) -> None:
        self._jetstream = jetstream
        self._streams = streams
        self._worker_id = worker_id
        self._epoch = epoch

    async def take(
        self,
        delivery: Delivery,
        job_id: str,
        traceparent: str,
        *,
        was_unclaimed: bool = False,
        has_begun: bool = False,
        state: Literal["working", "done"] = "working",
    ) -> Held | Standing:
        """Claim a job for `delivery`, or tell whose it is.

        `was_unclaimed`: an earlier delivery may have run it without a claim: then it may be settled, and a later one
        presumes one try. `has_begun`: this one has run without until now.

        Raises `DurableWorkUnavailable`, `ConnectionLost`, `PermissionDenied`, `DeadlineExceeded`.
        """
        key = self._key(delivery.subject, claim_name(job_id, delivery.headers))
        ours = JobClaim(
            state=state,
            job_id=job_id,
            worker_id=self._worker_id,
            epoch=self._epoch,
            delivery=delivery.num_delivered,
            stream_sequence=delivery.stream_sequence,
            attempt=2 if was_unclaimed and delivery.num_delivered > 1 else 1,
            traceparent=traceparent,
        )
        found, revision = await self._read(key) if delivery.num_delivered > 1 else (None, 0)
        for _ in range(_MAX_TRIES):
            stands = standing(found, delivery)
            if stands is Standing.OTHER and found is not None and not await self._is_in_stream(found.stream_sequence):
                stands = Standing.FREE
            if has_begun and found is not None and _is_of_one_delivery(found, ours):
                stands, ours = Standing.FREE, msgspec.structs.replace(ours, progress=found.progress)
            if was_unclaimed and found is None and await self._is_settled(delivery.stream_sequence):
                return Standing.SETTLED
            if stands not in (Standing.FREE, Standing.OURS):
                return stands
            if stands is Standing.OURS and found is not None:
                ours = msgspec.structs.replace(ours, attempt=found.attempt + 1, progress=found.progress)
            previous = found.traceparent if found else ""
            try:
                return Held(key, ours, await self._write(key, ours, revision), previous)
            except WrongSequence:
                found, revision = await self._read(key)
        return Standing.SUPERSEDED

    async def update(self, held: Held, **fields: object) -> None:
        """Change our claim. Raises `JobTakenOver` when it isn't ours any more."""
        claim = msgspec.structs.replace(held.claim, **fields)
        try:
            held.revision = await self._write(held.key, claim, held.revision)
        except WrongSequence:
            raise JobTakenOver(f"job {claim.job_id} was taken over by a later delivery") from None
        held.claim = claim

    def finish(self, held: Held) -> None:
        """Note that the job is done, whoever has the claim by now: done is done.

        Not confirmed: the ack that follows on the same connection is, and the server takes them in their order.
        Raises `ConnectionLost`.
        """
        done = msgspec.structs.replace(held.claim, state="done", progress=b"")
        self._jetstream.connection.publish_now(held.key, encode(done))

    def _key(self, subject: str, name: str) -> str:
        digest = hashlib.blake2b(f"{subject} {name}".encode(), digest_size=16).hexdigest()
        return f"{self._streams.claims.subjects[0][:-1]}{digest}"

    async def _read(self, key: str) -> tuple[JobClaim | None, int]:
        try:
            stored = await self._jetstream.last_message(self._streams.claims.name, key)
        except NoStream:
            await ensure_stream(self._jetstream, self._streams.claims)
            return None, 0
        if stored is None:
            return None, 0
        try:
            return decode(stored.payload, JobClaim), stored.sequence
        except MessageError:  # a delete marker, or something that isn't ours
            return None, stored.sequence

    async def _write(self, key: str, claim: JobClaim, revision: int | None) -> int:
        headers = {} if revision is None else {EXPECTED_SEQUENCE_HEADER: str(revision)}
        payload = encode(claim)
        try:
            return (await self._jetstream.publish(key, payload, headers)).sequence
        except NoStream:
            await ensure_stream(self._jetstream, self._streams.claims)
            return (await self._jetstream.publish(key, payload, headers)).sequence

    async def _is_settled(self, sequence: int) -> bool:
        """What may not be looked at is taken to be there. Nor is a "gone" acked: a replica may be behind."""
        with contextlib.suppress(PermissionDenied):
            return not await self._is_in_stream(sequence)
        return False

    async def _is_in_stream(self, sequence: int) -> bool:
        return await self._jetstream.message(self._streams.jobs.name, sequence) is not None


def _is_of_one_delivery(found: JobClaim, ours: JobClaim) -> bool:
    """Whether a claim is our own, of a write whose answer was lost."""
    return (found.state, found.epoch, found.delivery, found.stream_sequence) == (
        "working",
        ours.epoch,
        ours.delivery,
        ours.stream_sequence,
    )
