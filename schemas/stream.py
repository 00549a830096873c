"""The frames of a streamed reply: numbered, and with an end that tells how many there were.

A handler yields frames without numbers; the endpoint numbers them from 0, so that a gap is an error at the caller and
never a silently lost token. A stream ends with its own `LastFrame`, which says more than that it ends, or with the
`StreamEnd` that the endpoint sends; or with a `Fault`. Nothing follows either.
"""

from schemas.message import Message

UNNUMBERED = -1


class Frame(Message, frozen=True, kw_only=True):
    """Base of what a stream yields. `seq` is set by the endpoint that sends it."""

    seq: int = UNNUMBERED


class LastFrame(Frame, frozen=True, kw_only=True):
    """Base of a frame that ends its stream; `seq` is the number of frames before it."""


class StreamEnd(LastFrame, frozen=True, kw_only=True, tag="stream.end"):
    """The end of a stream that has no last frame of its own."""
