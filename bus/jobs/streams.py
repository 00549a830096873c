"""What nixlbus keeps in JetStream: the names and settings of its streams, buckets and consumers, and making them.

| name (for the prefix `nixlbus`) | holds |
|---|---|
| stream `NIXLBUS_JOBS` | jobs, on `nixlbus.v1.job.>`, each until it is acked (work queue) |
| consumer `<graph>+<queue>` of it | one per queue, shared by its workers |
| stream `NIXLBUS_DLQ` | dead letters, on `nixlbus.v1.dlq.>` |
| stream `KV_NIXLBUS_CLAIMS` | the KV bucket of claims |
| stream `OBJ_NIXLBUS_MEDIA` | the object store of large messages |

Each is made when it is first missed, and what is there is taken as it is: an operator who made it beforehand, with
other limits or for workers that may not create anything, is not overruled.
"""

import json
import math
from dataclasses import dataclass, replace
from typing import Any

from bus.control_plane.jetstream import JetStream, JetStreamError
from bus.errors import DurableWorkUnavailable, PermissionDenied
from schemas.subjects import SUBJECT_VERSION, Subject

DUPLICATE_WINDOW_S = 120.0
"""NATS's default: within it a job id that was submitted before is not stored again."""
DEAD_LETTER_DUPLICATE_WINDOW_S = 3600.0
"""Longer than any `ack_wait_s`: a worker that died between a dead letter and its term leaves one, not two."""
DEAD_LETTER_MAX_AGE_S = 30 * 86_400.0
CLAIM_MAX_AGE_S = 86_400.0
"""How long a done job is remembered, unless a queue needs its claims for longer."""
MAX_WAITING = 4096
"""Requests for jobs that may wait at a consumer. A worker has at most one for each slot, mostly far fewer; NATS's
default of 512 is 32 workers of 16 slots at worst."""
_STREAM_NOT_FOUND = 10059
_CONSUMER_NOT_FOUND = 10014
_NAME_IN_USE = 10058


@dataclass(frozen=True, slots=True)
class StreamSettings:
    """One stream: its name, and what its creation asks for."""

    name: str
    settings: dict[str, Any]

    @property
    def subjects(self) -> list[str]:
        """What it stores."""
        return list(self.settings["subjects"])


class Streams:
    """The streams of one prefix."""

    def __init__(self, prefix: str, replicas: int, media_ttl_s: float) -> None:
        upper = prefix.upper()
        self.jobs = _stream(
            f"{upper}_JOBS",
            replicas,
            subjects=[f"{prefix}.{SUBJECT_VERSION}.job.>"],
            retention="workqueue",
            discard="new",
            duplicate_window=_ns(DUPLICATE_WINDOW_S),
        )
        self.dead_letters = _stream(
            f"{upper}_DLQ",
            replicas,
            subjects=[f"{prefix}.{SUBJECT_VERSION}.dlq.>"],
            max_age=_ns(DEAD_LETTER_MAX_AGE_S),
            duplicate_window=_ns(DEAD_LETTER_DUPLICATE_WINDOW_S),
        )
        self.claims = _stream(  # the settings of a KV bucket, ADR-8
            f"KV_{upper}_CLAIMS",
            replicas,
            subjects=[f"$KV.{upper}_CLAIMS.>"],
            max_age=_ns(CLAIM_MAX_AGE_S),
            duplicate_window=_ns(DUPLICATE_WINDOW_S),
            max_msgs_per_subject=1,
            discard="new",
            allow_rollup_hdrs=True,
            deny_delete=True,
        )
        self.media_bucket = f"{upper}_MEDIA"
        self.media = _stream(  # the settings of an object store, ADR-20
            f"OBJ_{upper}_MEDIA",
            replicas,
            subjects=[f"$O.{upper}_MEDIA.C.>", f"$O.{upper}_MEDIA.M.>"],
            max_age=_ns(media_ttl_s),
            duplicate_window=_ns(min(DUPLICATE_WINDOW_S, media_ttl_s)),
            discard="new",
            allow_rollup_hdrs=True,
        )


async def ensure_claims(jetstream: JetStream, stream: StreamSettings, claim_s: float) -> None:
    """Make the bucket of claims unless it is there, for claims that last `claim_s` seconds at least.

    Raises `DurableWorkUnavailable` where it is there and forgets them sooner, and as `ensure_stream` does.
    """
    longer = replace(stream, settings={**stream.settings, "max_age": max(stream.settings["max_age"], _ns(claim_s))})
    info = await ensure_stream(jetstream, longer)
    max_age_ns = info["config"].get("max_age", 0) if info else 0
    if 0 < max_age_ns < _ns(claim_s):
        raise DurableWorkUnavailable(
            f"{stream.name} forgets a claim after {max_age_ns / 1e9:g} s, and with it what a job has used up: "
            f"max_duration_s, ack_wait_s and the longest pause of this queue take {claim_s:g} s together",
            remedy=f"'nats stream edit {stream.name} --max-age={math.ceil(claim_s)}s', or declare shorter times",
        )


async def ensure_stream(jetstream: JetStream, stream: StreamSettings) -> dict[str, Any] | None:
    """Make a stream unless it is there, and return what JetStream tells of it.

    Raises `DurableWorkUnavailable` where another has its name or its subjects. Without the right to look, it is taken
    to be there (None is returned): using it will tell.
    """
    try:
        info = await jetstream.api(f"STREAM.INFO.{stream.name}")
    except PermissionDenied:
        return None
    except JetStreamError as error:
        if error.number != _STREAM_NOT_FOUND:
            raise
        info = await _create_stream(jetstream, stream)
    _check_subjects(stream, info)
    return info


async def _create_stream(jetstream: JetStream, stream: StreamSettings) -> dict[str, Any]:
    try:
        return await jetstream.api(f"STREAM.CREATE.{stream.name}", stream.settings)
    except JetStreamError as error:
        if error.number != _NAME_IN_USE:
            raise
        return await jetstream.api(f"STREAM.INFO.{stream.name}")  # another was faster


def _check_subjects(stream: StreamSettings, info: dict[str, Any]) -> None:
    subjects = info["config"].get("subjects", [])
    if not set(stream.subjects) <= set(subjects):
        raise DurableWorkUnavailable(
            f"the stream {stream.name} keeps {', '.join(subjects)} and not {', '.join(stream.subjects)}",
            remedy="remove it ('nats stream rm'), or use another NIXLBUS_PREFIX",
        )


@dataclass(frozen=True, slots=True)
class ConsumerSettings:
    """A durable pull consumer of the stream of jobs."""

    stream: str
    durable: str
    subject: Subject
    ack_wait_s: float
    max_ack_pending: int
    max_deliver: int
    """Deliveries that the *worker* allows; the server's own limit must be above it, or none."""

    @property
    def name(self) -> str:
        """As subjects of the API name it."""
        return f"{self.stream}.{self.durable}"

    @property
    def creation(self) -> dict[str, Any]:
        """The request that makes it. The server itself never gives up on a message: whoever gets it too often does."""
        return {
            "stream_name": self.stream,
            "config": {
                "durable_name": self.durable,
                "filter_subject": self.subject.name,
                "ack_policy": "explicit",
                "deliver_policy": "all",
                "replay_policy": "instant",
                "ack_wait": _ns(self.ack_wait_s),
                "max_ack_pending": self.max_ack_pending,
                "max_deliver": -1,
                "max_waiting": MAX_WAITING,
            },
        }


async def ensure_consumer(jetstream: JetStream, consumer: ConsumerSettings) -> float:
    """Make a consumer unless it is there, and return its ack_wait in seconds: one that is there keeps its settings.

    Raises `DurableWorkUnavailable` for one that can't do our work. Without the right to look or to create, it is
    taken to be as we would make it: pulling will tell.
    """
    try:
        info = await jetstream.api(f"CONSUMER.INFO.{consumer.name}")
    except PermissionDenied:
        return consumer.ack_wait_s
    except JetStreamError as error:
        if error.number != _CONSUMER_NOT_FOUND:
            raise
        info = await jetstream.api(f"CONSUMER.DURABLE.CREATE.{consumer.name}", consumer.creation)
    config = info["config"]
    found = config.get("filter_subject") or json.dumps(config.get("filter_subjects", []))
    if found != consumer.subject.name or config.get("ack_policy") != "explicit" or config.get("deliver_subject"):
        raise DurableWorkUnavailable(
            f"the consumer {consumer.name} is no pull consumer of {consumer.subject.name} with explicit acks",
            remedy="remove it ('nats consumer rm'); workers make it anew",
        )
    limit = config.get("max_deliver", -1)
    if 0 < limit <= consumer.max_deliver:
        raise DurableWorkUnavailable(
            f"the consumer {consumer.name} gives up after {limit} deliveries, which strands a job whose worker dies",
            remedy=f"set its max_deliver to -1 or above {consumer.max_deliver} ('nats consumer edit')",
        )
    return float(config["ack_wait"]) / 1e9


def _stream(name: str, replicas: int, **settings: Any) -> StreamSettings:
    common = {"name": name, "storage": "file", "num_replicas": replicas, "allow_direct": True, "retention": "limits"}
    return StreamSettings(name, {**common, **settings})


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
