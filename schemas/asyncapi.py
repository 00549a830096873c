"""AsyncAPI 3.0: one document that describes every subject of a bus, for readers and tools that have no nixlbus.

In: `Channel` values, each a kind of subject with the JSON schemas of what travels there. Out: the document, as plain
maps. Who knows what is served makes the channels: `bus.bus_channels` those of the protocol, `workers.channels` those of
workers' classes and of live workers. A document says what a worker does: it receives on what it serves.
Source: https://www.asyncapi.com/docs/reference/specification/v3.0.0 and its NATS bindings 0.1.0.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.fault import Fault
from schemas.json_schema import Schema, json_schema, schema_id
from schemas.protocol import (
    AVOID_HEADER,
    PROTOCOL_HEADER,
    REQUEST_ID_HEADER,
    SERVICE_ERROR_CODE_HEADER,
    SERVICE_ERROR_HEADER,
    SUPPORTED_VERSIONS,
    TTL_HEADER,
    WINDOW_HEADER,
)
from schemas.subjects import Subject

Kind = Literal["unary", "stream", "event", "job"]
Action = Literal["receive", "send"]
MSGPACK, JSON = "application/msgpack", "application/json"
PARAMETERS = {
    "worker_id": "Who it is about or for: one worker instance.",
    "request_id": "The caller's id of a request, from its Nixlbus-Request-Id header.",
    "operation_id": "Of one paired operation.",
    "group": "The group of a service's endpoints, or the graph's name.",
    "queue": "The name of a job.",
}
"""What a subject may have in braces."""
_DESCRIPTION = """\
Every payload is one msgpack map with a `type`. Where a channel also has a message in JSON, a JSON object is understood
and answered in kind. The schemas describe the JSON form: what is base64 text there (`contentEncoding`) is bytes in
msgpack, and its lengths count the base64. An unknown field is ignored; a field that holds its default is left out.
An answer goes to the request's NATS reply subject. A stream's frames are numbered by `seq` from 0, and a stream ends
with a frame whose `seq` is the number of frames before it, or with a `fault`; nothing follows either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One kind of subject, and what travels there."""

    name: str
    """Its key in the document."""
    address: str
    """The subject, with parameters in braces; see `address_of`."""
    kind: Kind
    summary: str = ""
    request: Schema | None = None
    """The self-contained schema of a message or a union of them; None where the payload is empty or unknown."""
    reply: Schema | None = None
    queue_group: str = ""
    public: bool = False
    """Open to plain clients: JSON is understood, and no header is required."""
    bare: bool = False
    """Without headers, as between workers that have shaken hands."""
    actions: tuple[Action, ...] = ("receive",)
    details: Mapping[str, Any] = field(default_factory=dict)
    """What else is known: concurrency, milliseconds, schema ids; under `x-nixlbus` in the document."""


def placeholder(parameter: str) -> str:
    """Stands for a parameter of `PARAMETERS` when a subject is built, since braces may not."""
    return f"-{parameter}-"


def address_of(subject: Subject) -> str:
    """The subject with its placeholders as parameters in braces."""
    tokens = subject.name.split(".")
    named = {placeholder(parameter): f"{{{parameter}}}" for parameter in PARAMETERS}
    return ".".join(named.get(token, token) for token in tokens)


def document(
    channels: Iterable[Channel], *, title: str, version: str, server: str = "127.0.0.1:4222", description: str = ""
) -> dict[str, Any]:
    """The AsyncAPI document of `channels`. Several may have one name: who listens in another way, or to other messages.

    `server` is a NATS server's host and port, without credentials.
    """
    components = _Components()
    fault = components.members(json_schema(Fault))[0][1]
    described: dict[str, Any] = {}
    operations: dict[str, Any] = {}
    for channel in channels:
        own = _channels(channel, components)
        for name, parts in own.items():
            known = described.setdefault(name, parts)
            known["messages"] = parts["messages"] | known["messages"]
        _add(operations, _operations(channel, own))
    return {
        "asyncapi": "3.0.0",
        "info": {"title": title, "version": version, "description": f"{description}\n\n{_DESCRIPTION}".strip()},
        "defaultContentType": MSGPACK,
        "servers": {"nats": {"host": server, "protocol": "nats", "description": "A NATS server, or one of a cluster."}},
        "channels": described,
        "operations": operations,
        "components": {
            "schemas": dict(sorted((components.schemas | _HEADERS).items())),
            "messages": {
                "fault": _message("fault", fault, MSGPACK, "FaultHeaders"),
                "fault.json": _message("fault", fault, JSON, "FaultHeaders"),
            },
        },
    }


def _channels(channel: Channel, components: "_Components") -> dict[str, Any]:
    """The channel itself, and the one of its replies."""
    requests = _messages(channel, components.members(channel.request), _request_headers(channel))
    described: dict[str, Any] = {"address": channel.address, "messages": requests}
    if channel.summary:
        described["summary"] = channel.summary
    parameters = {name: {"description": text} for name, text in PARAMETERS.items() if f"{{{name}}}" in channel.address}
    if parameters:
        described["parameters"] = parameters
    if not _is_answered(channel):
        return {channel.name: described}
    faults = ("fault", "fault.json") if channel.public else ("fault",)
    replies: dict[str, Any] = {
        "address": None,
        "summary": f"The reply subject of a request on {channel.name}.",
        "messages": {
            **(_messages(channel, components.members(channel.reply), "") if channel.reply else {}),
            **{fault: {"$ref": f"#/components/messages/{fault}"} for fault in faults},
        },
    }
    return {channel.name: described, _reply_name(channel): replies}


def _messages(channel: Channel, members: list[tuple[str, Schema]], headers: str) -> dict[str, Any]:
    found = {tag: _message(tag, payload, MSGPACK, headers) for tag, payload in members}
    if channel.public:
        found.update({f"{tag}.json": _message(tag, payload, JSON, headers) for tag, payload in members})
    return found or {"empty": {"summary": "No payload, or one that is not described here.", **_headers(headers)}}


def _message(tag: str, payload: Schema, content_type: str, headers: str) -> dict[str, Any]:
    return {"name": tag, "contentType": content_type, "payload": payload, **_headers(headers)}


def _headers(headers: str) -> dict[str, Any]:
    return {"headers": {"$ref": f"#/components/schemas/{headers}"}} if headers else {}


def _request_headers(channel: Channel) -> str:
    if channel.bare:
        return ""
    if not _is_answered(channel):
        return "EventHeaders"
    return "PublicRequestHeaders" if channel.public else "RequestHeaders"


def _is_answered(channel: Channel) -> bool:
    return channel.kind in ("unary", "stream")


def _reply_name(channel: Channel) -> str:
    return f"{channel.name}.reply"


def _add(operations: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add operations; one that is there already, as of a second instance, is not added again."""
    for name, operation in more.items():
        names = (name, *(f"{name}-{number}" for number in range(2, len(operations) + 3)))
        free = next(each for each in names if operations.get(each, operation) == operation)
        operations[free] = operation


def _operations(channel: Channel, described: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{channel.name}.{action}": _operation(channel, action, described) for action in channel.actions}


def _operation(channel: Channel, action: Action, described: Mapping[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {"action": action, **_channel_and_messages(channel.name, described)}
    if channel.summary:
        operation["summary"] = channel.summary
    if channel.queue_group and action == "receive":
        operation["bindings"] = {"nats": {"queue": channel.queue_group, "bindingVersion": "0.1.0"}}
    if _is_answered(channel):
        operation["reply"] = _channel_and_messages(_reply_name(channel), described)
    operation["x-nixlbus"] = {"kind": channel.kind, **channel.details}
    return operation


def _channel_and_messages(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    at = f"#/channels/{name}"
    return {
        "channel": {"$ref": at},
        "messages": [{"$ref": f"{at}/messages/{message}"} for message in described[name]["messages"]],
    }


class _Components:
    """The document's schemas, each once: what a self-contained schema has in `$defs` is moved here."""

    def __init__(self) -> None:
        self.schemas: dict[str, Schema] = {}

    def members(self, schema: Schema | None) -> list[tuple[str, Schema]]:
        """Tag and schema of each message that `schema` stands for."""
        if schema is None:
            return []
        definitions: dict[str, Schema] = schema.get("$defs", {})
        names = self._names(definitions, schema)
        for name, definition in definitions.items():
            self.schemas.setdefault(names[name], _draft_07(definition, names))
        moved = _draft_07({key: part for key, part in schema.items() if key != "$defs"}, names)
        return [(self._tag(member), member) for member in moved.get("anyOf", [moved])]

    def _names(self, definitions: Mapping[str, Schema], schema: Schema) -> dict[str, str]:
        """Their own, or with a digest where something else has it: two services may each have a `Request`."""
        names = {name: name for name in definitions}
        digest = schema_id(json.dumps(schema, sort_keys=True)).removeprefix("sha256:")[:8]
        while True:
            taken = [name for name in names if names[name] == name and self._is_taken(name, definitions, names)]
            if not taken:
                return names
            names.update({name: f"{name}-{digest}" for name in taken})  # and now who refers to it is another as well

    def _is_taken(self, name: str, definitions: Mapping[str, Schema], names: Mapping[str, str]) -> bool:
        present = self.schemas.get(name)
        return present is not None and not _is_same(present, _draft_07(definitions[name], names))

    def _tag(self, member: Schema) -> str:
        name = str(member.get("$ref", "")).rpartition("/")[2]
        tags = self.schemas.get(name, member).get("properties", {}).get("type", {}).get("enum", ["message"])
        return str(tags[0])


def _is_same(one: Any, other: Any) -> bool:
    """Equal but for prose, which a live worker's schemas lack."""
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for schema in (one, other) for key, part in schema.items() if not _is_prose(key, part)}
        return all(key in one and key in other and _is_same(one[key], other[key]) for key in keys)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_is_same, one, other))
    return bool(one == other)


def _is_prose(key: str, part: Any) -> bool:
    return key == "description" and isinstance(part, str)


def _draft_07(schema: Any, names: Mapping[str, str]) -> Any:
    """A schema as AsyncAPI's own dialect, draft 07, has it, with its references to `names` among the components."""
    if isinstance(schema, list):
        return [_draft_07(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    if isinstance(schema.get("$ref"), str):
        name = schema["$ref"].rpartition("/")[2]
        return {"$ref": f"#/components/schemas/{names.get(name, name)}"}  # what stands beside it means nothing there
    parts = {
        key: _draft_07(part, names)
        for key, part in schema.items()
        if not (key == "discriminator" and "anyOf" in schema)  # OpenAPI's; AsyncAPI means something else by it
    }
    if isinstance(parts.get("prefixItems"), list):
        parts["additionalItems"] = parts.get("items", True)
        parts["items"] = parts.pop("prefixItems")
    return parts


_TRACE = {
    "traceparent": {"type": "string", "description": "W3C trace context of the sender's span."},
    "tracestate": {"type": "string"},
}
_REQUEST = {
    PROTOCOL_HEADER: {"type": "string", "enum": [str(version) for version in SUPPORTED_VERSIONS]},
    TTL_HEADER: {"type": "string", "pattern": "^[0-9]{1,15}$", "description": "Milliseconds that the caller grants."},
    REQUEST_ID_HEADER: {
        "type": "string",
        "description": "Random, one per call: a caller that goes away publishes on cancel.{request_id}.",
    },
    WINDOW_HEADER: {
        "type": "string",
        "pattern": "^[0-9]{1,9}$",
        "description": "Of a stream: frames that may be unread at one time.",
    },
    AVOID_HEADER: {"type": "string", "description": "Worker ids, with commas, that refused this request before."},
    **_TRACE,
}
_HEADERS: dict[str, Schema] = {
    "RequestHeaders": {"type": "object", "properties": _REQUEST, "required": [PROTOCOL_HEADER]},
    "PublicRequestHeaders": {"type": "object", "properties": _REQUEST},
    "EventHeaders": {"type": "object", "properties": _TRACE},
    "FaultHeaders": {
        "type": "object",
        "properties": {
            SERVICE_ERROR_HEADER: {"type": "string", "description": "The fault's message."},
            SERVICE_ERROR_CODE_HEADER: {"type": "string", "description": "The HTTP status that stands for its code."},
        },
    },
}
