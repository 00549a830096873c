"""The handshake: how one worker learns another's NIXL agent metadata and registered regions, authenticated.

The description travels as the exact bytes that the MAC covers, so that nothing is decoded, and NIXL sees nothing,
before the proof holds.
"""

from typing import Annotated

from msgspec import Meta

from schemas.message import Message, Part
from schemas.operations import Count, Positive, WorkerId

Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
MAX_DESCRIPTION_BYTES = 1 << 20
"""An agent with 1,001 regions describes itself in 44 KB; a mebibyte is generous and still bounded."""


class AgentMetadataRequest(Message, frozen=True, kw_only=True, tag="handshake.request"):
    """Who are you? With a fresh nonce, so that an old answer can't be played again."""

    nonce: Nonce
    requester: WorkerId


class AgentMetadataReply(Message, frozen=True, kw_only=True, tag="handshake.reply"):
    """A packed `AgentDescription` and its proof."""

    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION_BYTES)]
    key_id: str
    mac: Annotated[bytes, Meta(min_length=32, max_length=32)]


class Region(Part, frozen=True, kw_only=True):
    """Registered memory: where it is in the owner's address space."""

    region: Count
    address: Positive
    length_bytes: Positive
    memory_type: str
    """NIXL's name: DRAM, VRAM."""
    device_id: Count = 0


class AgentDescription(Message, frozen=True, kw_only=True, tag="handshake.description"):
    """One worker's agent in one epoch."""

    worker_id: WorkerId
    epoch: str
    agent_name: str
    agent_metadata: bytes
    regions: list[Region]
