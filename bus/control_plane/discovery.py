"""Service discovery as NATS defines it (ADR-32): every worker answers on `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`.

In: a worker's identity and its endpoints. Out: the JSON that `nats micro ls`, `info` and `stats` read, and, on the
asking side, the list of live workers. A worker that is cut off simply doesn't answer: the list is never stale.
An endpoint's metadata tells what it takes and gives: tags, schema ids, and the JSON schemas themselves as far as they
are small; a longer one is left out, and its id stands alone.
Source: NATS architecture decision record 32.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from bus.control_plane.connection import Connection, Msg, Subscription
from bus.control_plane.inbox import Inbox
from bus.control_plane.listing import Listed, Listing
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, NoResponders
from schemas.codec import message_tags
from schemas.json_schema import schema_id, schema_text
from schemas.stream import frames_of
from schemas.subjects import may_be_answered

VERBS = ("PING", "INFO", "STATS")
QUIET_S = 0.2
"""No further answer for this long ends the list; an idle worker answers within a millisecond."""
MAX_SCHEMA_BYTES = 8 << 10
"""A longer schema stays out of the answer. The longest of the packaged graph has 3.1 KB."""
MAX_SCHEMAS_BYTES = 64 << 10
"""All schemas of one answer together: a sixteenth of the payload that a NATS server takes unless told otherwise."""


class ServiceIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers."""

    name: str
    id: str
    version: str
    metadata: dict[str, str]


class EndpointInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What INFO tells of an endpoint. ADR-32 has metadata of text alone."""

    name: str
    subject: str
    queue_group: str
    metadata: dict[str, str]


class Service:
    """Answers discovery for one worker."""

    def __init__(self, connection: Connection, identity: ServiceIdentity, listed: Sequence[Listed]) -> None:
        self._connection = connection
        self._identity = identity
        self._listed = listed
        self._infos = _infos(listed, min(MAX_SCHEMAS_BYTES, connection.max_payload_bytes // 4))
        self._started = datetime.now(UTC).isoformat().replace("+00:00", "Z")
        self._subscriptions: list[Subscription] = []

    async def open(self) -> None:
        """Subscribe to the three verbs, for all services, this one's name, and this instance."""
        for verb in VERBS:
            for suffix in ("", f".{self._identity.name}", f".{self._identity.name}.{self._identity.id}"):
                subscription = await self._connection.subscribe(f"$SRV.{verb}{suffix}", self._on_message)
                self._subscriptions.append(subscription)

    async def close(self) -> None:
        """Disappear from discovery."""
        await asyncio.gather(*(self._connection.unsubscribe(subscription) for subscription in self._subscriptions))

    def _on_message(self, message: Msg) -> None:
        ours = self._infos[0].subject if self._infos else message.subject
        if may_be_answered(message.reply, ours):
            verb = message.subject.split(".")[1]
            self._connection.publish_now(message.reply, msgspec.json.encode(self._answer(verb)))

    def _answer(self, verb: str) -> dict[str, Any]:
        answer: dict[str, Any] = {
            "type": f"io.nats.micro.v1.{verb.lower()}_response",
            **msgspec.to_builtins(self._identity),
        }
        if verb == "INFO":
            answer["description"] = f"nixlbus {self._identity.metadata.get('role', 'worker')}"
            answer["endpoints"] = self._infos
        if verb == "STATS":
            answer["started"] = self._started
            answer["endpoints"] = [each.statistics() for each in self._listed]
        return answer


class _EndpointTold(msgspec.Struct):
    name: str
    subject: str
    queue_group: str = ""
    metadata: dict[str, str] = {}


class _FiguresTold(msgspec.Struct):
    name: str
    subject: str
    num_requests: int = 0
    num_errors: int = 0
    processing_time: int = 0
    data: dict[str, int] = {}


class _InfoTold(msgspec.Struct):
    """What is read of an INFO answer; there may be more in it."""

    name: str
    id: str
    metadata: dict[str, str]
    version: str = ""
    endpoints: list[_EndpointTold] = []


class _StatsTold(msgspec.Struct):
    """What is read of a STATS answer."""

    name: str
    id: str
    started: str = ""
    endpoints: list[_FiguresTold] = []


_NO_FIGURES: Mapping[str, Any] = {"started": "", "endpoints": []}


async def discover(connection: Connection, inbox: Inbox, *, timeout_s: float) -> list[dict[str, Any]]:
    """The live workers of this bus: their INFO answers, each with its `endpoints` completed by STATS.

    Anybody may answer: what isn't of ADR-32's types, or of no worker, is left out, and so is a second answer of an id.
    """
    infos = {
        told["id"]: told
        for told in reversed(await _ask_all(connection, inbox, "$SRV.INFO", _InfoTold, timeout_s))
        if "nixlbus" in told["metadata"]
    }
    stats = {
        (told["name"], told["id"]): told
        for told in reversed(await _ask_all(connection, inbox, "$SRV.STATS", _StatsTold, timeout_s))
    }
    services = []
    for info in sorted(infos.values(), key=lambda told: (told["name"], told["id"])):
        figures = stats.get((info["name"], info["id"]), _NO_FIGURES)
        measured = {_key(endpoint): endpoint for endpoint in figures["endpoints"]}
        endpoints = [{**measured.get(_key(endpoint), {}), **endpoint} for endpoint in info["endpoints"]]
        services.append({**info, "started": figures["started"], "endpoints": endpoints})
    return services


def _key(endpoint: Mapping[str, Any]) -> tuple[Any, Any]:
    return endpoint["name"], endpoint["subject"]  # an event may have the name of a stage


async def _ask_all(
    connection: Connection, inbox: Inbox, subject: str, told_type: type[_InfoTold | _StatsTold], timeout_s: float
) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    overall = Deadline.after(timeout_s)
    async with inbox.waiting(subject) as (reply_subject, waiter):
        connection.publish_now(subject, b"", reply=reply_subject)
        while not overall.expired:
            quiet = overall if not answers else Deadline.after(min(QUIET_S, overall.remaining_s))
            try:
                answers.append(_read((await waiter.next(quiet)).data, told_type))
            except (DeadlineExceeded, NoResponders):
                break
            except (msgspec.MsgspecError, UnicodeError, RecursionError, BusError):
                continue
    return answers


def _read(answer: bytes, told_type: type[_InfoTold | _StatsTold]) -> dict[str, Any]:
    """All that an answer holds, what `told_type` has of it with its types and defaults.

    Raises `MsgspecError`, `UnicodeError`, `RecursionError`.
    """
    everything = msgspec.json.decode(answer)
    told = msgspec.convert(everything, told_type)
    both = zip(everything.get("endpoints", ()), told.endpoints, strict=True)
    endpoints = [{**whole, **msgspec.to_builtins(read)} for whole, read in both]
    return {**everything, **msgspec.to_builtins(told), "endpoints": endpoints}


def _infos(listed: Sequence[Listed], budget_bytes: int) -> list[EndpointInfo]:
    infos = []
    for listing in (each.listing() for each in listed):
        metadata = _metadata(listing)
        for direction, message_type in _types(listing):
            text = _schema_text(message_type)
            if text:
                metadata[f"{direction}_schema_id"] = schema_id(text)
            if text and len(text) <= min(MAX_SCHEMA_BYTES, budget_bytes):
                metadata[f"{direction}_schema"] = text
                budget_bytes -= len(text)
        infos.append(
            EndpointInfo(name=listing.name, subject=listing.subject, queue_group=listing.queue_group, metadata=metadata)
        )
    return infos


def _metadata(listing: Listing) -> dict[str, str]:
    metadata = {direction: ",".join(message_tags(message_type)) for direction, message_type in _types(listing)}
    metadata["kind"] = listing.kind
    metadata["concurrency"] = str(listing.concurrency)
    metadata["max_queued"] = str(listing.max_queued)
    metadata["timeout_ms"] = str(int(listing.timeout_s * 1000))
    if listing.public:
        metadata["public"] = "true"
    return metadata


def _types(listing: Listing) -> list[tuple[str, Any]]:
    reply_type = listing.reply_type
    if reply_type is not None and listing.kind == "stream":
        reply_type = frames_of(reply_type)
    both = (("request", listing.request_type), ("reply", reply_type))
    return [(direction, message_type) for direction, message_type in both if message_type is not None]


def _schema_text(message_type: Any) -> str:
    try:
        return schema_text(message_type)
    except TypeError:
        return ""  # a field without a counterpart in JSON: the tags must do
