"""`Delivery`: one message as a JetStream consumer delivered it, and the words with which it is answered.

In: a message whose reply subject is JetStream's ack subject. Out: its payload, and what the ack subject tells.
Source: ADR-15, "JetStream ack": `$JS.ACK.<stream>.<consumer>.<delivered>.<stream seq>.<consumer seq>.<time>.<pending>`,
or the same after `<domain>.<account>`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from bus.control_plane.connection import Msg

ACK = b"+ACK"
IN_PROGRESS = b"+WPI"
ACK_PREFIX = "$JS.ACK."
_SHORT_TOKENS = 9
_LONG_TOKENS = 11


@dataclass(frozen=True, slots=True, eq=False)
class Delivery:
    """One delivery of a stored message."""

    subject: str
    payload: bytes
    headers: Mapping[str, str]
    ack_subject: str
    stream_sequence: int
    num_delivered: int
    """Which delivery of this message it is, counted from 1."""
    stored_at_ns: int
    """When the server stored it, by its clock, since 1970."""


def delivery_of(message: Msg) -> Delivery | None:
    """The delivery that a message is, or None for anything else."""
    tokens = message.reply.split(".")
    if len(tokens) != _SHORT_TOKENS and len(tokens) < _LONG_TOKENS:
        return None
    first = 4 if len(tokens) == _SHORT_TOKENS else 6
    try:
        delivered, sequence, _, stored_at_ns = (int(token) for token in tokens[first : first + 4])
    except ValueError:
        return None
    return Delivery(
        message.subject, message.data, message.headers or {}, message.reply, sequence, delivered, stored_at_ns
    )


def nak(delay_s: float) -> bytes:
    """Deliver it again, to whoever asks, after `delay_s`."""
    return b"-NAK " + json.dumps({"delay": int(delay_s * 1e9)}).encode()


def term(reason: str) -> bytes:
    """Never deliver it again."""
    return f"+TERM {' '.join(reason.split())[:200]}".encode()
