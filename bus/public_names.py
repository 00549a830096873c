"""Everything that `bus` offers by name. `bus/__init__.py` brings it in when the first of the names is asked for.

In: the modules below. Out: `__all__`, sorted, which is exactly what is public.
nixl and torch are imported when a bus opens its data plane, so that this works where they aren't installed.
"""

from bus.blocks.pool import BlockLayout, BlockPool, KvBlocks
from bus.bus import Bus
from bus.channels import bus_channels
from bus.config import BusConfig, ConfigError
from bus.control_plane.call import CallMeter
from bus.control_plane.declaration import Place, StreamCall, UnaryCall
from bus.control_plane.embedded_server import (
    EmbeddedServer,
    ServerUnavailable,
    embedded_server,
    server_binary,
)
from bus.control_plane.endpoint import EndpointConfig, Handler
from bus.control_plane.permissions import RoleAccess, Roles, RolesFileError, load_roles, with_people
from bus.control_plane.request_context import Middleware, RequestContext, current_request
from bus.control_plane.retry import RetryPolicy
from bus.control_plane.server_configuration import ServerSettings, TlsFiles, server_configuration
from bus.control_plane.server_files import ServerFiles, UserFiles, write_server_files
from bus.data_plane.agent import keep_stdout_clean
from bus.data_plane.descriptor import Descriptor, Device, DeviceKind
from bus.data_plane.memory import ArenaTensor, LocalMemory
from bus.data_plane.probe import ProbeReport, probe_data_plane
from bus.data_plane.transfer import TransferCancelled, TransferReport
from bus.deadline import Deadline
from bus.errors import (
    AuthenticationError,
    BusError,
    Cancelled,
    ChecksumMismatch,
    ConnectionLost,
    ControlPlaneError,
    DataPlaneError,
    DeadLetterNotFound,
    DeadlineExceeded,
    Declined,
    Draining,
    DurableWorkUnavailable,
    ForeignGrant,
    IncompatiblePeer,
    IncompleteOperation,
    InvalidDescriptor,
    JobTakenOver,
    LeaseExpired,
    LocalProtocolError,
    MediaMismatch,
    MediaNotFound,
    NoResponders,
    NotContiguous,
    Overloaded,
    PayloadTooLarge,
    PeerLost,
    PermissionDenied,
    PoolExhausted,
    ReadOnlyMemory,
    RegistrationError,
    RemoteFault,
    RemoteProtocolError,
    RequestRefused,
    StaleGrant,
    TransferError,
    WrongLayout,
    WrongLength,
    WrongPairing,
    fault_of,
)
from bus.handshake.authentication import KeyFileError, write_key_file
from bus.handshake.process_identity import identity_of
from bus.jobs.consumer import JobConsumer
from bus.jobs.current import CurrentJob, current_job
from bus.jobs.dead_letters import DeadLetter, DeadLetters
from bus.jobs.media import MediaStore
from bus.jobs.queue import JobQueueConfig, JobReceipt
from bus.jobs.settlement import JobHandler
from bus.jobs.verdict import JobExpired
from bus.operations.claim import Claim, PendingClaim
from bus.operations.initiator import OperationReport, ReadOperation, WriteOperation
from bus.operations.lifecycle import GrantState
from bus.operations.target import OperationStatus, PeerOutcome, ReadableOperation, WritableOperation
from schemas.fault import Fault, FaultCode
from schemas.media import MediaReference
from schemas.message import Message, Part
from schemas.operations import CompletionAck, Initiator, ProcessIdentity, RdmaMetadata
from schemas.stream import Frame, LastFrame

__all__ = [
    "ArenaTensor",
    "AuthenticationError",
    "BlockLayout",
    "BlockPool",
    "Bus",
    "BusConfig",
    "BusError",
    "CallMeter",
    "Cancelled",
    "ChecksumMismatch",
    "Claim",
    "CompletionAck",
    "ConfigError",
    "ConnectionLost",
    "ControlPlaneError",
    "CurrentJob",
    "DataPlaneError",
    "DeadLetter",
    "DeadLetterNotFound",
    "DeadLetters",
    "Deadline",
    "DeadlineExceeded",
    "Declined",
    "Descriptor",
    "Device",
    "DeviceKind",
    "Draining",
    "DurableWorkUnavailable",
    "EmbeddedServer",
    "EndpointConfig",
    "Fault",
    "FaultCode",
    "ForeignGrant",
    "Frame",
    "GrantState",
    "Handler",
    "IncompatiblePeer",
    "IncompleteOperation",
    "Initiator",
    "InvalidDescriptor",
    "JobConsumer",
    "JobExpired",
    "JobHandler",
    "JobQueueConfig",
    "JobReceipt",
    "JobTakenOver",
    "KeyFileError",
    "KvBlocks",
    "LastFrame",
    "LeaseExpired",
    "LocalMemory",
    "LocalProtocolError",
    "MediaMismatch",
    "MediaNotFound",
    "MediaReference",
    "MediaStore",
    "Message",
    "Middleware",
    "NoResponders",
    "NotContiguous",
    "OperationReport",
    "OperationStatus",
    "Overloaded",
    "Part",
    "PayloadTooLarge",
    "PeerLost",
    "PeerOutcome",
    "PendingClaim",
    "PermissionDenied",
    "Place",
    "PoolExhausted",
    "ProbeReport",
    "ProcessIdentity",
    "RdmaMetadata",
    "ReadOnlyMemory",
    "ReadOperation",
    "ReadableOperation",
    "RegistrationError",
    "RemoteFault",
    "RemoteProtocolError",
    "RequestContext",
    "RequestRefused",
    "RetryPolicy",
    "RoleAccess",
    "Roles",
    "RolesFileError",
    "ServerFiles",
    "ServerSettings",
    "ServerUnavailable",
    "StaleGrant",
    "StreamCall",
    "TlsFiles",
    "TransferCancelled",
    "TransferError",
    "TransferReport",
    "UnaryCall",
    "UserFiles",
    "WritableOperation",
    "WriteOperation",
    "WrongLayout",
    "WrongLength",
    "WrongPairing",
    "bus_channels",
    "current_job",
    "current_request",
    "embedded_server",
    "fault_of",
    "identity_of",
    "keep_stdout_clean",
    "load_roles",
    "probe_data_plane",
    "server_binary",
    "server_configuration",
    "with_people",
    "write_key_file",
    "write_server_files",
]
