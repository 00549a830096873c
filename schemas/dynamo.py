"""The metadata of NVIDIA Dynamo's `dynamo.nixl_connect`: what its targets publish, and its initiators take.

In: JSON text from a Dynamo process. Out: `DynamoMetadata`, or an `InvalidMessage`; and the way back. It carries raw
addresses and a whole NIXL agent, without version, expiry or proof of who made it. Decompression is bounded.
Source: dynamo.nixl_connect of ai-dynamo-runtime 1.6.1, `RdmaMetadata` and `SerializedDescriptor`.
"""

import base64
import binascii
import zlib
from typing import Annotated

import msgspec
from msgspec import Meta

from schemas.codec import InvalidMessage

READ, WRITE = 1, 2
"""Its `OperationKind`: what the initiator will do."""
MAX_JSON_BYTES = 4 << 20
MAX_AGENT_METADATA_BYTES = 1 << 20
_PREFIX = "b64:"


class DynamoDescriptor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One range of the target's memory."""

    device: Annotated[str, Meta(pattern=r"^(cpu|cuda(:[0-9]{1,3})?)\Z")]
    ptr: Annotated[int, Meta(ge=1, le=2**63 - 1)]
    size: Annotated[int, Meta(ge=1, le=2**63 - 1)]


class DynamoMetadata(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A target's invitation."""

    descriptors: Annotated[list[DynamoDescriptor], Meta(min_length=1, max_length=65_536)]
    nixl_metadata: str
    """`b64:` and base64, or hex, of the compressed agent metadata."""
    notification_key: Annotated[str, Meta(min_length=1, max_length=1024)]
    """What the initiator's NIXL notification must say, exactly."""
    operation_kind: Annotated[int, Meta(ge=READ, le=WRITE)]

    @classmethod
    def from_json(cls, text: str | bytes) -> "DynamoMetadata":
        """Parse what Dynamo's `model_dump_json()` printed. Raises `InvalidMessage`."""
        if len(text) > MAX_JSON_BYTES:
            raise InvalidMessage(f"Dynamo's metadata has {len(text):,} bytes; {MAX_JSON_BYTES:,} are allowed")
        try:
            return msgspec.json.decode(text, type=cls)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise InvalidMessage(f"not Dynamo's metadata: {str(error)[:200]}") from None

    def to_json(self) -> str:
        """As Dynamo reads it."""
        return msgspec.json.encode(self).decode()

    @property
    def num_bytes(self) -> int:
        """Bytes that the operation moves."""
        return sum(descriptor.size for descriptor in self.descriptors)

    def agent_metadata(self) -> bytes:
        """The target's agent, uncompressed. Raises `InvalidMessage`, also for one that grows past its bound."""
        text = self.nixl_metadata
        try:
            packed = base64.b64decode(text.removeprefix(_PREFIX)) if text.startswith(_PREFIX) else bytes.fromhex(text)
            unpacked = zlib.decompressobj().decompress(packed, MAX_AGENT_METADATA_BYTES + 1)
        except (ValueError, binascii.Error, zlib.error) as error:
            raise InvalidMessage(f"Dynamo's agent metadata is malformed: {error}") from None
        if not 0 < len(unpacked) <= MAX_AGENT_METADATA_BYTES:
            raise InvalidMessage(f"Dynamo's agent metadata is empty or over {MAX_AGENT_METADATA_BYTES:,} bytes")
        return unpacked


def packed_agent_metadata(agent_metadata: bytes) -> str:
    """Agent metadata as `nixl_metadata` carries it."""
    return _PREFIX + base64.b64encode(zlib.compress(agent_metadata, 6)).decode()
