"""Who may publish and subscribe to what: from a description of the roles to the NATS permissions of each user.

In: `RoleAccess` of every role of a graph, its own or `load_roles` from TOML. Out: `Permissions`, lists of subjects as
nats-server's configuration has them. Invariants: a role subscribes to the stages that it serves inside their queue
groups only, to its own direct subjects, acks and inbox, and to events; it publishes to what it calls, to what an
operation needs of those whose memory it reads or writes, to its own events and to cancellations, and to every inbox:
answers go there, and only who was told an inbox's random name can use it. Everything else is denied. There is no
`allow_responses`: it lets whoever publishes a message that it hears itself, with a reply subject of its choice, publish
to that subject. Whoever may ask JetStream can still make the server answer on a subject of its choice
(docs/security.md). Pure but for `load_roles`.
"""

import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from schemas.jobs import durable_name
from schemas.performance import GRANT_ENDPOINT
from schemas.subjects import DEFAULT_PREFIX, INBOX, Subjects, identifier

OPERATOR, OBSERVER, PROVISIONER = "operator", "observer", "provisioner"
SYSTEM_USER = "sys"
"""The user of nats-server's system account."""
RESERVED = (SYSTEM_USER, "server")
DISCOVERY = tuple(f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".>"))
TARGET_ENDPOINTS = ("agent_metadata", "claim", GRANT_ENDPOINT)
"""What an initiator asks of a target; a test holds them against what the operations ask."""
INITIATOR_ENDPOINTS = ("operation_status",)
"""What a target asks of an initiator."""

_Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}\Z")]
_Stage = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64})?\Z")]
_Served = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_-]{1,64}( [A-Za-z0-9_-]{1,64})?\Z")]
_Raw = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_$*>-]+(\.[A-Za-z0-9_$*>-]+)*\Z")]
_RawInGroup = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_$*>-]+(\.[A-Za-z0-9_$*>-]+)*( [A-Za-z0-9_-]{1,64})?\Z")]
_Direct = Annotated[str, Meta(pattern=r"^([A-Za-z0-9_-]{1,64}|\*)\.[A-Za-z0-9_-]{1,64}\Z")]


class RolesFileError(ValueError):
    """A file of roles that can't be used; the text names it and says why."""


class RoleAccess(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one role does on the bus. Stages and queues are of the role's own graph."""

    serves: list[_Served] = []
    """Stages that it answers for, each in the queue group of its own name, or `"<stage> <queue group>"`."""
    calls: list[_Stage] = []
    """Stages that it sends requests to; `"<graph>.<stage>"` for another graph's."""
    calls_workers: list[_Direct] = []
    """Direct endpoints of single workers that it calls: `"<role>.<endpoint>"`, or `"*.<endpoint>"` of every role."""
    writes_to: list[_Name] = []
    """Roles whose granted memory it writes."""
    reads_from: list[_Name] = []
    """Roles whose granted memory it reads."""
    works: list[_Name] = []
    """Durable queues that it takes jobs from."""
    submits: list[_Name] = []
    """Durable queues that it submits jobs to."""
    only_asks: bool = False
    """A program that serves nothing: it has no direct subjects, no place in discovery, and no events of its own."""
    lists: bool = False
    """Whether it asks service discovery and hears events, though it only asks; every worker may."""
    dead_letters: bool = False
    """Whether it reads, replays and drops dead letters."""
    provisions: bool = False
    """Whether it makes the streams and consumers of the graph's queues where they are missing. It can so have any
    subject stored, and delivered anywhere."""
    media: bool = False
    """Whether it puts large messages into the object store, and gets them."""
    publish: list[_Raw] = []
    """Further subjects to publish to, as NATS has them: for what the lines above don't know."""
    subscribe: list[_RawInGroup] = []
    """Further subjects to subscribe to, `"<subject> <queue group>"` inside a group only."""

    @property
    def initiates_with(self) -> list[str]:
        """Roles that it begins operations with."""
        return sorted({*self.writes_to, *self.reads_from})


class Roles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The roles of one graph. Raises `RolesFileError` for names that don't fit together."""

    graph: _Name
    roles: dict[_Name, RoleAccess]

    def __post_init__(self) -> None:
        for name, role in self.roles.items():
            for other in role.initiates_with:
                if other not in self.roles:
                    raise RolesFileError(f"role {name} reads or writes the memory of {other!r}, which is no role here")
            if role.only_asks and (role.serves or role.works or self.moves_tensors(name)):
                raise RolesFileError(f"role {name} only asks, and so serves no stage, no queue and no memory")
            if name in RESERVED:
                raise RolesFileError(f"a role can't be named {name!r}: a folder of the output has this name")

    def targets_of(self, name: str) -> list[str]:
        """Roles whose memory `name` reads or writes."""
        return self.roles[name].initiates_with

    def initiators_of(self, name: str) -> list[str]:
        """Roles that read or write the memory of `name`."""
        return sorted(other for other, role in self.roles.items() if name in role.initiates_with)

    def moves_tensors(self, name: str) -> bool:
        """Whether it takes part in operations, and so needs the bus's shared key."""
        return bool(self.targets_of(name) or self.initiators_of(name))

    @property
    def queues(self) -> list[str]:
        """The durable queues of the graph."""
        return sorted({queue for role in self.roles.values() for queue in (*role.works, *role.submits)})

    @property
    def keeps_media(self) -> bool:
        """Whether a role uses the object store."""
        return any(role.media for role in self.roles.values())


class Permissions(msgspec.Struct, frozen=True, kw_only=True):
    """What a user of nats-server may do."""

    publish: list[str]
    subscribe: list[str]


def load_roles(path: Path) -> Roles:
    """Read roles from a TOML file; docs/security.md says what stands in it. Raises `RolesFileError`."""
    try:
        loaded = msgspec.convert(tomllib.loads(path.read_text()), Roles)
    except OSError as error:
        raise RolesFileError(f"{path} can't be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, msgspec.ValidationError, UnicodeDecodeError, RolesFileError) as error:
        raise RolesFileError(f"{path}: {error}") from None
    return with_people(loaded)


def with_people(roles: Roles) -> Roles:
    """The same with `operator` and `observer`, and `provisioner` for what is durable, where they are not described."""
    people = {
        OPERATOR: RoleAccess(only_asks=True, lists=True, dead_letters=True, calls_workers=["traces.trace", "*.perf"]),
        OBSERVER: RoleAccess(only_asks=True, lists=True),
    }
    if roles.queues or roles.keeps_media:
        people[PROVISIONER] = RoleAccess(only_asks=True, provisions=True)
    missing = {name: role for name, role in people.items() if name not in roles.roles}
    return msgspec.structs.replace(roles, roles={**roles.roles, **missing})


def permissions(roles: Roles, name: str, *, instance: str = "", prefix: str = DEFAULT_PREFIX) -> Permissions:
    """The permissions of role `name`; with `instance`, of that one worker `<name>.<instance>` alone.

    Raises `KeyError` for an unknown role and `InvalidIdentifier` for a bad instance or prefix.
    """
    role = roles.roles[name]
    if instance:
        identifier("instance", instance)
    rights = _Rights(roles, name, f"{name}.{instance}" if instance else name, Subjects(prefix).root)
    publish = [
        f"{INBOX}.>",
        *rights.requests(role),
        *rights.operations(),
        *rights.jobs(role),
        *rights.provisions(role),
        *role.publish,
    ]
    subscribe = [f"{INBOX}.{rights.owner}.>", *rights.service(role), *role.subscribe]
    return Permissions(publish=_unique(publish), subscribe=_unique(subscribe))


class _Rights:
    """The subjects of one user, by what they are for."""

    def __init__(self, roles: Roles, name: str, owner: str, root: str) -> None:
        self.roles = roles
        self.name = name
        self.owner = owner
        """The first tokens of this user's worker ids: a role, or one worker."""
        self.root = root
        self.streams = _StreamNames(root.partition(".")[0])
        self.is_worker = not roles.roles[name].only_asks

    def service(self, role: RoleAccess) -> Iterator[str]:
        """What it listens to."""
        for served in role.serves:
            stage, _, queue_group = served.partition(" ")
            yield f"{self.root}.graph.{self.roles.graph}.{stage} {queue_group or stage}"
        if self.is_worker:
            yield f"{self.root}.worker.{self.owner}.>"
            yield f"{self.root}.cancel.*"
            yield from DISCOVERY
        if self.roles.moves_tensors(self.name):
            yield f"{self.root}.ack.{self.owner}.>"
        if role.lists or self.is_worker:
            yield f"{self.root}.event.>"

    def requests(self, role: RoleAccess) -> Iterator[str]:
        """What it asks for, and says of itself."""
        for called in role.calls:
            graph, _, stage = called.rpartition(".")
            yield f"{self.root}.graph.{graph or self.roles.graph}.{stage}"
        for direct in role.calls_workers:
            other, _, endpoint = direct.partition(".")
            yield f"{self.root}.worker.{other}.{endpoint}"
            yield f"{self.root}.worker.{other}.*.{endpoint}"
        if role.calls or role.calls_workers or self.is_worker:
            yield f"{self.root}.cancel.*"
        if self.is_worker:
            yield f"{self.root}.event.{self.owner}.>"
        if role.lists or self.is_worker:
            yield from DISCOVERY

    def operations(self) -> Iterator[str]:
        """What paired operations need."""
        for target in self.roles.targets_of(self.name):
            for endpoint in TARGET_ENDPOINTS:
                yield f"{self.root}.worker.{target}.*.{endpoint}"
            yield f"{self.root}.ack.{target}.*.*"
        for initiator in self.roles.initiators_of(self.name):
            for endpoint in INITIATOR_ENDPOINTS:
                yield f"{self.root}.worker.{initiator}.*.{endpoint}"

    def jobs(self, role: RoleAccess) -> Iterator[str]:
        """What the use of durable queues needs of JetStream: the streams and consumers of this prefix by name."""
        graph = self.roles.graph
        for queue in role.submits:
            yield f"{self.root}.job.{graph}.{queue}"
            yield f"$JS.API.STREAM.INFO.{self.streams.jobs}"
        for queue in role.works:
            consumer = self._consumer(queue)
            for stream in self.streams.of_queues:
                yield f"$JS.API.STREAM.INFO.{stream}"
            yield f"$JS.API.CONSUMER.INFO.{consumer}"
            yield f"$JS.API.CONSUMER.MSG.NEXT.{consumer}"
            yield f"$JS.ACK.{consumer}.>"
            yield f"{self.root}.dlq.{graph}.{queue}"
            yield f"$KV.{self.streams.claims_bucket}.>"
            yield f"$JS.API.DIRECT.GET.{self.streams.jobs}"
            yield f"$JS.API.DIRECT.GET.{self.streams.claims}"
        if role.dead_letters:
            yield "$JS.API.INFO"
            for verb in ("STREAM.MSG.DELETE", "DIRECT.GET"):
                yield f"$JS.API.{verb}.{self.streams.letters}"
            yield f"{self.root}.job.>"
        if role.media:
            for verb in ("STREAM.INFO", "STREAM.PURGE", "DIRECT.GET"):
                yield f"$JS.API.{verb}.{self.streams.media}"
            yield f"$O.{self.streams.media_bucket}.>"

    def provisions(self, role: RoleAccess) -> Iterator[str]:
        """What making the graph's streams and consumers needs, and never to change one that is there."""
        if not role.provisions:
            return
        queues = self.roles.queues
        for stream in [*(self.streams.of_queues if queues else ()), *([self.streams.media] * self.roles.keeps_media)]:
            yield f"$JS.API.STREAM.INFO.{stream}"
            yield f"$JS.API.STREAM.CREATE.{stream}"
        for queue in queues:
            yield f"$JS.API.CONSUMER.INFO.{self._consumer(queue)}"
            yield f"$JS.API.CONSUMER.DURABLE.CREATE.{self._consumer(queue)}"

    def _consumer(self, queue: str) -> str:
        return f"{self.streams.jobs}.{durable_name(self.roles.graph, queue)}"


class _StreamNames:
    """The streams of one prefix; a test holds them against those that `bus.jobs.streams` makes."""

    def __init__(self, prefix: str) -> None:
        upper = prefix.upper()
        self.jobs = f"{upper}_JOBS"
        self.letters = f"{upper}_DLQ"
        self.claims_bucket = f"{upper}_CLAIMS"
        self.claims = f"KV_{self.claims_bucket}"
        self.of_queues = (self.jobs, self.letters, self.claims)
        self.media_bucket = f"{upper}_MEDIA"
        self.media = f"OBJ_{self.media_bucket}"


def _unique(subjects: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(subjects))
