"""Service discovery as NATS defines it (ADR-32): every worker answers on `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`.

In: a worker's identity and its endpoints. Out: the JSON that `nats micro ls`, `info` and `stats` read, and, on the
asking side, the list of live workers. A worker that is cut off simply doesn't answer: the list is never stale.
Source: NATS architecture decision record 32.
"""

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from bus.control_plane.connection import Connection, Msg, Subscription
from bus.control_plane.endpoint import Endpoint
from bus.control_plane.inbox import Inbox
from bus.deadline import Deadline
from bus.errors import BusError, DeadlineExceeded, NoResponders
from schemas.subjects import may_be_answered

VERBS = ("PING", "INFO", "STATS")
QUIET_S = 0.2
"""No further answer for this long ends the list; an idle worker answers within a millisecond."""


class ServiceIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """Who answers."""

    name: str
    id: str
    version: str
    metadata: dict[str, str]


class Service:
    """Answers discovery for one worker."""

    def __init__(self, connection: Connection, identity: ServiceIdentity, endpoints: Sequence[Endpoint]) -> None:
        self._connection = connection
        self._identity = identity
        self._endpoints = endpoints
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
        ours = self._endpoints[0].config.subject if self._endpoints else message.subject
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
            answer["endpoints"] = [_info(endpoint) for endpoint in self._endpoints]
        if verb == "STATS":
            answer["started"] = self._started
            answer["endpoints"] = [_stats(endpoint) for endpoint in self._endpoints]
        return answer


async def discover(connection: Connection, inbox: Inbox, *, timeout_s: float) -> list[dict[str, Any]]:
    """The live workers of this bus: their INFO answers, each with its `endpoints` completed by STATS."""
    infos = await _ask_all(connection, inbox, "$SRV.INFO", timeout_s)
    stats = {answer["id"]: answer for answer in await _ask_all(connection, inbox, "$SRV.STATS", timeout_s)}
    services = []
    for info in sorted(infos, key=lambda answer: (answer["name"], answer["id"])):
        if "nixlbus" not in info.get("metadata", {}):
            continue
        measured = {endpoint["name"]: endpoint for endpoint in stats.get(info["id"], {}).get("endpoints", [])}
        endpoints = [{**measured.get(endpoint["name"], {}), **endpoint} for endpoint in info.get("endpoints", [])]
        services.append({**info, "started": stats.get(info["id"], {}).get("started", ""), "endpoints": endpoints})
    return services


async def _ask_all(connection: Connection, inbox: Inbox, subject: str, timeout_s: float) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []
    overall = Deadline.after(timeout_s)
    async with inbox.waiting(subject) as (reply_subject, waiter):
        connection.publish_now(subject, b"", reply=reply_subject)
        while not overall.expired:
            quiet = overall if not answers else Deadline.after(min(QUIET_S, overall.remaining_s))
            try:
                answers.append(msgspec.json.decode((await waiter.next(quiet)).data))
            except (DeadlineExceeded, NoResponders):
                break
            except (msgspec.MsgspecError, BusError):
                continue
    return [answer for answer in answers if isinstance(answer, Mapping) and "id" in answer and "name" in answer]


def _info(endpoint: Endpoint) -> dict[str, Any]:
    config = endpoint.config
    return {
        "name": config.name,
        "subject": config.subject.name,
        "queue_group": config.queue_group,
        "metadata": {
            "request": str(config.request_type.__struct_config__.tag),
            "concurrency": str(config.concurrency),
        },
    }


def _stats(endpoint: Endpoint) -> dict[str, Any]:
    stats = endpoint.stats
    average_ns = stats.processing_time_ns // stats.num_requests if stats.num_requests else 0
    return {
        "name": endpoint.config.name,
        "subject": endpoint.config.subject.name,
        "queue_group": endpoint.config.queue_group,
        "num_requests": stats.num_requests,
        "num_errors": stats.num_errors,
        "last_error": stats.last_error,
        "processing_time": stats.processing_time_ns,
        "average_processing_time": average_ns,
    }
