"""nixlbus's public API: open a `Bus`, call and serve typed messages, move tensors by paired operations.

nixl and torch are imported when a bus opens its data plane, so that `import bus` works where they aren't installed.
"""

from bus.blocks.pool import BlockLayout, BlockPool, KvBlocks
from bus.bus import Bus
from bus.config import BusConfig, ConfigError
from bus.control_plane.call import CallMeter
from bus.control_plane.embedded_server import (
    EmbeddedServer,
    ServerUnavailable,
    embedded_server,
    server_binary,
    server_configuration,
)
from bus.control_plane.endpoint import EndpointConfig, Handler
from bus.data_plane.agent import keep_stdout_clean
from bus.data_plane.memory import ArenaTensor, Descriptor
from bus.data_plane.probe import ProbeReport, probe_data_plane
from bus.deadline import Deadline
from bus.errors import (
    AuthenticationError,
    BusError,
    ConnectionLost,
    ControlPlaneError,
    DataPlaneError,
    DeadlineExceeded,
    Draining,
    IncompatiblePeer,
    LocalProtocolError,
    NoResponders,
    Overloaded,
    PayloadTooLarge,
    PeerLost,
    PermissionDenied,
    PoolExhausted,
    RegistrationError,
    RemoteFault,
    RemoteProtocolError,
    RequestRefused,
    StaleGrant,
    TransferError,
    fault_of,
)
from bus.handshake.authentication import KeyFileError, write_key_file
from bus.operations.claim import Claim, PendingClaim
from bus.operations.initiator import OperationReport, ReadOperation, WriteOperation
from bus.operations.target import ReadableOperation, WritableOperation

__all__ = [
    "ArenaTensor",
    "AuthenticationError",
    "BlockLayout",
    "BlockPool",
    "Bus",
    "BusConfig",
    "BusError",
    "CallMeter",
    "Claim",
    "ConfigError",
    "ConnectionLost",
    "ControlPlaneError",
    "DataPlaneError",
    "Deadline",
    "DeadlineExceeded",
    "Descriptor",
    "Draining",
    "EmbeddedServer",
    "EndpointConfig",
    "Handler",
    "IncompatiblePeer",
    "KeyFileError",
    "KvBlocks",
    "LocalProtocolError",
    "NoResponders",
    "OperationReport",
    "Overloaded",
    "PayloadTooLarge",
    "PeerLost",
    "PendingClaim",
    "PermissionDenied",
    "PoolExhausted",
    "ProbeReport",
    "ReadOperation",
    "ReadableOperation",
    "RegistrationError",
    "RemoteFault",
    "RemoteProtocolError",
    "RequestRefused",
    "ServerUnavailable",
    "StaleGrant",
    "TransferError",
    "WritableOperation",
    "WriteOperation",
    "embedded_server",
    "fault_of",
    "keep_stdout_clean",
    "probe_data_plane",
    "server_binary",
    "server_configuration",
    "write_key_file",
]
