"""JetStream over our own connection: its API, its publishes with their confirmation, and reading a stored message.

In: an operation, a message, a subject. Out: JetStream's answer, or a typed error, at once: these are requests on our
inbox, so a denied subject, a lost connection and a server without JetStream are told when they happen, where nats-py's
own context waits for its timeout.
Invariants: every request has a deadline; an error of the server's keeps its number (`JetStreamError.number`).
Leaves out: pulling (`pull`), what streams there are (`bus.jobs.streams`).
Source: the JetStream wire API, https://docs.nats.io/reference/reference-protocols/nats_api_reference; ADR-31 (direct
get).
"""

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec

from bus.control_plane.connection import Connection, Msg
from bus.control_plane.inbox import Inbox
from bus.deadline import Deadline
from bus.errors import DurableWorkUnavailable, NoResponders, PermissionDenied
from schemas.subjects import Subject

API_TIMEOUT_S = 5.0
"""nats-py's own default for the JetStream API."""
_API = "$JS.API"
_OFF = (10039, 10076)
"""Error numbers: not enabled for the account, not enabled."""
_FULL = (10023, 10028, 10047, 10077)
"""Error numbers: resources, memory, storage, the stream's own limits."""
_WRONG_SEQUENCE = (10071, 10164)
_ENABLE = "enable JetStream in the NATS server (a 'jetstream { store_dir: … }' block, or nats-server -js) and account"


class JetStreamError(DurableWorkUnavailable):
    """JetStream refused. Attribute: `number`, its own error number (0 for none)."""

    def __init__(self, what: str, *, remedy: str = "", subject: str = "", number: int = 0) -> None:
        self.number = number
        super().__init__(what, remedy=remedy, subject=subject)


class WrongSequence(JetStreamError):
    """A compare-and-set found another revision than expected."""


class NoStream(JetStreamError):
    """No stream takes this subject."""


@dataclass(frozen=True, slots=True)
class Stored:
    """That a message was stored, or had been."""

    stream: str
    sequence: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class StoredMessage:
    """A message as it lies in a stream."""

    subject: str
    sequence: int
    stored_at: datetime
    payload: bytes
    headers: dict[str, str]
    """The sender's own."""


class JetStream:
    """One connection's view of JetStream."""

    def __init__(self, connection: Connection, inbox: Inbox) -> None:
        self.connection = connection
        self._inbox = inbox
        self.clock_offset_s = 0.0
        """The server's clock less ours, from the last answer that told it: ages in a stream are by the server's."""

    async def api(
        self, operation: str, request: Mapping[str, Any] | None = None, *, timeout_s: float = API_TIMEOUT_S
    ) -> dict[str, Any]:
        """Ask the API, `STREAM.INFO.NAME` for example.

        Raises `JetStreamError`, `PermissionDenied`, `ConnectionLost`, `DeadlineExceeded`.
        """
        subject = f"{_API}.{operation}"
        payload = json.dumps(request).encode() if request else b""
        asked_at_s = time.time()
        answer = _answer(await self._asked(subject, payload, None, timeout_s), subject)
        self._learn_clock(answer.get("ts", ""), (asked_at_s + time.time()) / 2)
        return answer

    async def check(self) -> None:
        """Raise `JetStreamError` if there is no JetStream: where a stream is missing, that may be why.

        Without the right to ask, there is taken to be.
        """
        with contextlib.suppress(PermissionDenied):
            await self.api("INFO")

    async def publish(
        self,
        subject: str,
        payload: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        timeout_s: float = API_TIMEOUT_S,
    ) -> Stored:
        """Publish and wait until a stream has stored it.

        Raises `NoStream`, `WrongSequence`, `JetStreamError`, `PayloadTooLarge`, and what `api` raises.
        """
        try:
            reply = await self._request(subject, payload, headers, timeout_s)
        except NoResponders:
            raise NoStream("no JetStream stream takes this subject", remedy=_ENABLE, subject=subject) from None
        try:
            confirmed = _CONFIRMATION.decode(reply.data)
        except msgspec.MsgspecError:
            raise JetStreamError("the answer to a publish is not JetStream's", subject=subject) from None
        if confirmed.error:
            raise _refusal(confirmed.error, subject)
        return Stored(confirmed.stream, confirmed.seq, confirmed.duplicate)

    async def confirm(self, subject: str, payload: bytes, timeout_s: float) -> None:
        """Send an ack and wait until the server has taken it."""
        await self._request(subject, payload, None, timeout_s)

    async def message(self, stream: str, sequence: int, *, timeout_s: float = API_TIMEOUT_S) -> StoredMessage | None:
        """A message by its number, or None."""
        return await self._direct(stream, {"seq": sequence}, timeout_s)

    async def next_message(
        self, stream: str, subject: str, sequence: int, *, timeout_s: float = API_TIMEOUT_S
    ) -> StoredMessage | None:
        """The first message on `subject`, which may hold wildcards, from number `sequence` on, or None."""
        return await self._direct(stream, {"seq": max(1, sequence), "next_by_subj": subject}, timeout_s)

    async def last_message(
        self, stream: str, subject: str, *, timeout_s: float = API_TIMEOUT_S
    ) -> StoredMessage | None:
        """The last message on a subject, or None."""
        return await self._direct(stream, {"last_by_subj": subject}, timeout_s)

    def age_s(self, stored_at_ns: int) -> float:
        """How long ago the server stored something, by its own clock."""
        return time.time() + self.clock_offset_s - stored_at_ns / 1e9

    async def _direct(self, stream: str, request: Mapping[str, Any], timeout_s: float) -> StoredMessage | None:
        subject = f"{_API}.DIRECT.GET.{stream}"
        reply = await self._asked(subject, json.dumps(request).encode(), None, timeout_s)
        headers = dict(reply.headers or {})
        status = headers.get("Status")
        if status == "404":
            return None
        if status is not None or "Nats-Sequence" not in headers:
            raise JetStreamError(
                f"the stream {stream} can't be read: {headers.get('Description', 'no reason given')}", subject=subject
            )
        return StoredMessage(
            headers["Nats-Subject"],
            int(headers["Nats-Sequence"]),
            _time(headers["Nats-Time-Stamp"]),
            reply.data,
            {name: value for name, value in headers.items() if name not in _DIRECT_HEADERS},
        )

    async def _asked(self, subject: str, payload: bytes, headers: Mapping[str, str] | None, timeout_s: float) -> Msg:
        try:
            return await self._request(subject, payload, headers, timeout_s)
        except NoResponders:
            if ".DIRECT.GET." in subject:
                raise NoStream("the stream doesn't exist or isn't ready", subject=subject) from None
            raise JetStreamError("the NATS server offers no JetStream", remedy=_ENABLE, subject=subject) from None

    async def _request(self, subject: str, payload: bytes, headers: Mapping[str, str] | None, timeout_s: float) -> Msg:
        return await self._inbox.single(
            Subject(subject, subject),
            Deadline.after(timeout_s),
            lambda inbox: self.connection.publish_now(subject, payload, reply=inbox, headers=headers),
        )

    def _learn_clock(self, server_time: str, our_time_s: float) -> None:
        if server_time:
            self.clock_offset_s = _time(server_time).timestamp() - our_time_s


_DIRECT_HEADERS = frozenset(
    {"Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Last-Sequence", "Nats-Num-Pending"}
)


class _Confirmation(msgspec.Struct):
    """ADR-17's PubAck, or why there is none."""

    stream: str = ""
    seq: int = 0
    duplicate: bool = False
    error: dict[str, Any] | None = None


_CONFIRMATION = msgspec.json.Decoder(_Confirmation)


def _answer(reply: Msg, subject: str) -> dict[str, Any]:
    try:
        answer = json.loads(reply.data)
        failed = answer.get("error")
    except (ValueError, AttributeError):
        raise JetStreamError("the answer is not JetStream's", subject=subject) from None
    if failed:
        raise _refusal(failed, subject)
    return dict(answer)


def _refusal(failed: Mapping[str, Any], subject: str) -> JetStreamError:
    number = int(failed.get("err_code", 0))
    what = f"JetStream refused: {failed.get('description', 'no reason given')}"
    if number in _OFF:
        return JetStreamError(what, remedy=_ENABLE, subject=subject, number=number)
    if number in _FULL:
        remedy = "free space (see 'nats stream ls'), or raise the limits of the stream, the account or the server"
        return JetStreamError(what, remedy=remedy, subject=subject, number=number)
    kind = WrongSequence if number in _WRONG_SEQUENCE else JetStreamError
    return kind(what, subject=subject, number=number)


def _time(text: str) -> datetime:
    """RFC 3339 with nanoseconds, as Go writes it, to microseconds."""
    seconds, dot, rest = text.partition(".")
    digits = rest.rstrip("Z").split("+")[0].split("-")[0]
    zone = rest[len(digits) :] if dot else ""
    return datetime.fromisoformat(f"{seconds}.{digits[:6]:0<6}{zone}" if dot else text)
