"""The frames of a streamed reply: numbered, and with an end that tells how many there were.

A handler yields frames without numbers; the endpoint numbers them from 0, so that a gap is an error at the caller and
never a silently lost token. A stream ends with its own `LastFrame`, which says more than that it ends, or with the
`StreamEnd` that the endpoint sends; or with a `Fault`. Nothing follows either.
"""

from typing import Any, get_args

from schemas.message import Message

UNNUMBERED = -1


class Frame(Message, frozen=True, kw_only=True):
    """Base of what a stream yields. `seq` is set by the endpoint that sends it."""

    seq: int = UNNUMBERED


class LastFrame(Frame, frozen=True, kw_only=True):
    """Base of a frame that ends its stream; `seq` is the number of frames before it."""


class StreamEnd(LastFrame, frozen=True, kw_only=True, tag="stream.end"):
    """The end of a stream that has no last frame of its own."""


def frames_of(frame_type: Any) -> Any:
    """What a stream of `frame_type`, a class or a union, is made of on the wire: with `StreamEnd` if that ends it."""
    members = get_args(frame_type) or (frame_type,)
    ends_itself = any(issubclass(member, LastFrame) for member in members)
    is_numbered_here = any(issubclass(member, Frame) for member in members)
    return frame_type | StreamEnd if is_numbered_here and not ends_itself else frame_type
