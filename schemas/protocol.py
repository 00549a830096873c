"""The protocol's version and the NATS headers that carry what is not in a message's body.

When to raise `PROTOCOL_VERSION`: a field that a peer of the version before would need and can't miss, a changed
meaning, a removed message. Not for a new optional field (unknown fields are ignored) or a new message type.

What is promised: a worker serves callers of its own version and of the one before, `SUPPORTED_VERSIONS`, and sends
its own. A worker that is older than its caller's protocol refuses it with `wrong_protocol`; so where a release raises
the version, workers that are called are upgraded before those that call them. A release that doesn't raise it can be
mixed with the one before in any order. A caller of version 1 gets its plain requests answered; its handshake is not
signed and is refused with a fault, so it moves no tensors to or from a worker of version 2.

History: 1 (0.1.0), the first. 2 (0.2.0, 0.3.0): the handshake's question is signed too, and names the requester's
process.
"""

PROTOCOL_VERSION = 2
SUPPORTED_VERSIONS = range(PROTOCOL_VERSION - 1, PROTOCOL_VERSION + 1)
"""Of callers: this version and the one before."""

PROTOCOL_HEADER = "Nixlbus-Protocol"
TTL_HEADER = "Nixlbus-Ttl-Ms"
"""Milliseconds that the sender still grants: a duration, so that no two hosts' clocks are compared."""
REQUEST_ID_HEADER = "Nixlbus-Request-Id"
"""Random, one per call: under it a caller that goes away cancels the work (`cancel.<request id>`), and only a caller
that sends it is asked whether it is still there."""
WINDOW_HEADER = "Nixlbus-Window"
"""Frames that the caller of a stream wants to have unread at one time; it grants more as it reads."""
AVOID_HEADER = "Nixlbus-Avoid"
"""Ids of workers, with commas, that refused this request before and had better pass it on."""
SERVICE_ERROR_HEADER = "Nats-Service-Error"
SERVICE_ERROR_CODE_HEADER = "Nats-Service-Error-Code"
"""Both from NATS ADR-32, so that `nats micro` and plain NATS clients see a fault without decoding its body."""


_SUPPORTED = frozenset(map(str, SUPPORTED_VERSIONS))


class WrongProtocol(ValueError):
    """A message of a protocol version that isn't supported. Attributes: `theirs` (text of the header), `ours`."""

    def __init__(self, theirs: str) -> None:
        self.theirs = theirs
        self.ours = PROTOCOL_VERSION
        super().__init__(
            f"protocol version {theirs[:20]!r} is not spoken here; this worker speaks {PROTOCOL_VERSION}"
            f" and understands {SUPPORTED_VERSIONS.start} to {PROTOCOL_VERSION}"
        )


def check_protocol(theirs: str | None, *, required: bool) -> None:
    """Accept one of `SUPPORTED_VERSIONS`, or none at all where it isn't `required`. Raises `WrongProtocol`."""
    if theirs is None:
        if required:
            raise WrongProtocol("")
    elif theirs.strip() not in _SUPPORTED:
        raise WrongProtocol(theirs)
