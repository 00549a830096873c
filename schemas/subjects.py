"""The names of the bus: every NATS subject that nixlbus publishes to or subscribes to is built here.

In: a prefix and identifiers. Out: `Subject` values, which carry the full NATS subject and the short, low-cardinality
template that traces and metrics use. Identifiers are checked, so that nobody's id can widen a subject with a dot or
a wildcard.
A worker id is one identifier or two joined by one dot, `<role>.<instance>`: with NATS credentials the second form lets
permissions match the role's token, in `worker.<role>.*.claim` or `_INBOX.<role>.>`.
"""

import re
from dataclasses import dataclass

IDENTIFIER = re.compile(r"[A-Za-z0-9_-]{1,64}")
WORKER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})?")
INBOX = "_INBOX"
"""NATS's own first token of reply subjects."""
SUBJECT_VERSION = "v1"
DEFAULT_PREFIX = "nixlbus"


class InvalidIdentifier(ValueError):
    """An identifier that may not stand in a subject.

    Attributes: `kind` (what it was to name), `value`.
    """

    def __init__(self, kind: str, value: str) -> None:
        self.kind = kind
        self.value = value
        super().__init__(f"{kind} {value[:80]!r} is not {self.expected}")

    @property
    def expected(self) -> str:
        """What it should be."""
        return "an identifier; use 1 to 64 of A-Z a-z 0-9 _ -"


class InvalidWorkerId(InvalidIdentifier):
    """A worker id that may not stand in a subject."""

    @property
    def expected(self) -> str:
        """What it should be."""
        return "a worker id; use 1 to 64 of A-Z a-z 0-9 _ -, or two such with one dot between (role.instance)"


@dataclass(frozen=True, slots=True)
class Subject:
    """One subject: `name` as NATS sees it, `template` as traces and metrics name it (no ids that grow in number)."""

    name: str
    template: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Subjects:
    """All subjects under one prefix. Every method raises `InvalidIdentifier` for a bad id."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        identifier("prefix", self.prefix)

    @property
    def root(self) -> str:
        """What every subject begins with: prefix and version."""
        return f"{self.prefix}.{SUBJECT_VERSION}"

    def graph(self, graph: str, stage: str) -> Subject:
        """A stage of a graph (generate, decode, prefill, encode): its workers listen in a queue group.

        A graph is also the group of a plain service's endpoints.
        """
        template = f"graph.{identifier('graph', graph)}.{identifier('stage', stage)}"
        return self._subject(template, template)

    def worker(self, worker_id: str, endpoint: str) -> Subject:
        """A direct call to one worker instance."""
        name = identifier("endpoint", endpoint)
        return self._subject(f"worker.{checked_worker_id(worker_id)}.{name}", f"worker.{{worker_id}}.{name}")

    def ack(self, target_worker_id: str, operation_id: str) -> Subject:
        """The completion ack of one operation; its target listens."""
        worker = checked_worker_id(target_worker_id)
        return self._subject(f"ack.{worker}.{identifier('operation id', operation_id)}", "ack.{worker_id}")

    def acks(self, target_worker_id: str) -> Subject:
        """Every ack for one target: its single wildcard subscription."""
        return self._subject(f"ack.{checked_worker_id(target_worker_id)}.*", "ack.{worker_id}")

    def cancel(self, request_id: str) -> Subject:
        """Says to whoever works on a request that its caller is gone."""
        return self._subject(f"cancel.{identifier('request id', request_id)}", "cancel")

    def cancellations(self) -> Subject:
        """Every cancellation: a worker looks whether it is one of its requests."""
        return self._subject("cancel.*", "cancel")

    def job(self, graph: str, queue: str) -> Subject:
        """Durable work of a queue, kept in a stream until it is done."""
        template = f"job.{identifier('graph', graph)}.{identifier('queue', queue)}"
        return self._subject(template, template)

    def dead_letter(self, graph: str, queue: str) -> Subject:
        """Jobs of a queue that could not be done."""
        template = f"dlq.{identifier('graph', graph)}.{identifier('queue', queue)}"
        return self._subject(template, template)

    def event(self, worker_id: str, kind: str) -> Subject:
        """A worker's lifecycle event (joined, ready, draining, left, drained, reaped): a hint, unless it is signed."""
        event = identifier("event", kind)
        return self._subject(f"event.{checked_worker_id(worker_id)}.{event}", f"event.{{worker_id}}.{event}")

    def events(self, kind: str) -> tuple[Subject, Subject]:
        """The events of one kind, of all workers: of those with a plain id, and of those with `<role>.<instance>`."""
        event = identifier("event", kind)
        template = f"event.{{worker_id}}.{event}"
        return self._subject(f"event.*.{event}", template), self._subject(f"event.*.*.{event}", template)

    def _subject(self, name: str, template: str) -> Subject:
        return Subject(f"{self.root}.{name}", template)


def identifier(kind: str, value: str) -> str:
    """Return `value` if it may stand in a subject, else raise `InvalidIdentifier`."""
    if not IDENTIFIER.fullmatch(value):
        raise InvalidIdentifier(kind, value)
    return value


def checked_worker_id(value: str, kind: str = "worker id") -> str:
    """Return `value` if it is a worker id, else raise `InvalidWorkerId`; `kind` says what it was to name."""
    if not WORKER_ID.fullmatch(value):
        raise InvalidWorkerId(kind, value)
    return value


def may_be_answered(reply: str, asked: Subject | str) -> bool:
    """Whether a reply may go to the subject `reply` of a request on `asked`.

    False for the bus's own subjects and the server's (`$JS`, `$SRV`, `$SYS`): who may ask a worker must not make it
    publish, with the worker's permissions, where the asker may not.
    """
    if reply.startswith("_INBOX."):
        return True
    first = reply.partition(".")[0]
    return bool(first) and not first.startswith("$") and first != str(asked).partition(".")[0]
