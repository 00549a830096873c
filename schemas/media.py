"""`MediaReference`: where a payload lies that is too large for a message, as a part of messages.

The bytes are in a bucket of NATS's JetStream object store (ADR-20), so `nats object get BUCKET NAME` reads them too.
"""

from schemas.message import Part


class MediaReference(Part, frozen=True, kw_only=True):
    """An object and the proof of its bytes."""

    bucket: str
    name: str
    digest: str
    """SHA-256 of the bytes, 64 hex digits."""
    num_bytes: int
    content_type: str = ""
