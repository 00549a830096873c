"""The handshake: how one worker learns another's NIXL agent metadata and registered regions, authenticated.

The description travels as the exact bytes that the MAC covers, so that nothing is decoded, and NIXL sees nothing,
before the proof holds. The question is signed as well: agent metadata is the capability to reach a worker's memory, so
only members of the bus are told it, and what the requester says of its own process can be believed.
"""

from typing import Annotated

import msgspec
from msgspec import Meta

from schemas.message import Message, Part
from schemas.operations import Count, Epoch, Positive, ProcessIdentity, WorkerId

Nonce = Annotated[bytes, Meta(min_length=16, max_length=16)]
Mac = Annotated[bytes, Meta(min_length=32, max_length=32)]
UNSIGNED = bytes(32)
"""Stands where the proof will."""
MAX_DESCRIPTION_BYTES = 1 << 20
"""An agent with 1,001 regions describes itself in 44 KB; a mebibyte is generous and still bounded."""


class AgentMetadataRequest(Message, frozen=True, kw_only=True, tag="handshake.request"):
    """Who are you? With a fresh nonce, so that an old answer can't be played again."""

    nonce: Nonce
    requester: WorkerId
    requester_epoch: Epoch = ""
    process: ProcessIdentity | None = None
    """The requester's: once it is gone, the requester writes no more."""
    regions: Annotated[list[Count], Meta(max_length=1024)] = msgspec.field(default_factory=list)
    """Only these regions, for a requester that knows the agent already; none: everything."""
    key_id: str = ""
    mac: Mac = UNSIGNED


class AgentMetadataReply(Message, frozen=True, kw_only=True, tag="handshake.reply"):
    """A packed `AgentDescription` and its proof."""

    description: Annotated[bytes, Meta(max_length=MAX_DESCRIPTION_BYTES)]
    key_id: str
    mac: Mac


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
    epoch: Epoch
    agent_name: str
    agent_metadata: bytes
    regions: list[Region]
