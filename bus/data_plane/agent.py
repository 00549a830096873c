"""The NIXL agent of this process: a thin, typed wrapper, and the only module that imports nixl.

In: addresses, lengths and an operation. Out: transfer handles and their states; NIXL's exceptions become ours here.
Invariants: STRICT synchronisation (the default segfaults with two threads); a progress thread whose poll timeout is
100 ms (Python's own wrapper hard-codes 0 and burns 82 % of a core; without the thread a silent target never finishes
the wire-up); telemetry on, so that the bytes of a transfer are NIXL's count and not ours; no pickled descriptors.
Leaves out: when to post and who waits (`transfer`).
"""

import os
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, NamedTuple

from bus.data_plane.addressing import AddressRange, CopyPair
from bus.errors import DataPlaneError, PeerLost, RegistrationError, TransferError

PROGRESS_POLL_TIMEOUT_US = 100_000
"""NIXL's pthrDelay: wake-ups come by file descriptor, this only bounds the wait (idle cost 0.06 % of a core)."""
DEFAULT_BACKEND = "UCX"
MEMORY_TYPES = ("DRAM", "VRAM")


class TransferDirection(Enum):
    """What the initiator does."""

    READ = "READ"
    WRITE = "WRITE"


class TransferState(Enum):
    """NIXL's status of a posted transfer."""

    IN_PROGRESS = "PROC"
    DONE = "DONE"


class TransferTelemetry(NamedTuple):
    """What NIXL measured of one transfer."""

    num_bytes: int
    num_descriptors: int
    post_us: int
    transfer_us: int


class NixlAgent:
    """One agent; thread-safe (STRICT). Raises `RegistrationError` when NIXL or its backend can't be had."""

    def __init__(self, name: str, backend: str = DEFAULT_BACKEND) -> None:
        self.name = name
        self.backend = backend
        self._nixl = _bindings()
        self._failures = tuple(getattr(self._nixl, name) for name in _ERRORS)
        self._agent = self._new_agent(name)
        self._backend_handle = self._new_backend(backend)
        self._segments = {"DRAM": self._nixl.DRAM_SEG, "VRAM": self._nixl.VRAM_SEG}
        self._read, self._write = self._nixl.NIXL_READ, self._nixl.NIXL_WRITE
        self._success, self._in_progress = self._nixl.NIXL_SUCCESS, self._nixl.NIXL_IN_PROG
        self._new_list = self._nixl.nixlXferDList
        self._backends = [self._backend_handle]

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and its registered memory. A capability: never logged."""
        return bytes(self._agent.getLocalMD())

    def partial_metadata(self, memory_type: str, ranges: Sequence[AddressRange]) -> bytes:
        """The same for some registered ranges only: for a peer that knows the agent already."""
        registered = [(part.address, part.length_bytes, part.device_id, "") for part in ranges]
        descriptors = self._nixl.nixlRegDList(self._segments[memory_type], registered)
        try:
            return bytes(self._agent.getLocalPartialMD(descriptors, True, self._backends))
        except self._failures as error:
            raise self._mapped(error, RegistrationError, "NIXL could not describe the registered memory") from None

    def register(self, address: int, length_bytes: int, memory_type: str, device_id: int) -> object:
        """Register memory; the returned token deregisters it. Raises `RegistrationError`."""
        descriptors = self._nixl.nixlRegDList(self._segments[memory_type], [(address, length_bytes, device_id, "")])
        try:
            self._agent.registerMem(descriptors, self._backends)
        except self._failures as error:
            raise self._mapped(
                error, RegistrationError, f"could not register {length_bytes:,} bytes of {memory_type}"
            ) from None
        return descriptors

    def deregister(self, token: object) -> None:
        """Forget registered memory. No fence: a peer's transfer under way still lands."""
        try:
            self._agent.deregisterMem(token, self._backends)
        except self._failures as error:
            raise self._mapped(error, RegistrationError, "could not deregister memory") from None

    def load_peer(self, metadata: bytes) -> str:
        """Make a peer known; returns its agent name. Only for metadata whose authenticity was proved."""
        try:
            return bytes(self._agent.loadRemoteMD(metadata)).decode()
        except self._failures as error:
            raise self._mapped(error, PeerLost, "NIXL refused the peer's agent metadata") from None

    def create_transfer(
        self,
        direction: TransferDirection,
        pairs: Sequence[CopyPair],
        peer: str,
        memory_types: tuple[str, str] = ("DRAM", "DRAM"),
        notification: str = "",
    ) -> int:
        """A transfer handle, not yet posted. Raises `TransferError` or `PeerLost`.

        `memory_types` are the local side's and the remote one's; `notification` is sent to the peer with DONE.
        """
        local = [(pair.local_address, pair.length_bytes, pair.local_device_id) for pair in pairs]
        remote = [(pair.remote_address, pair.length_bytes, pair.remote_device_id) for pair in pairs]
        local_type, remote_type = memory_types
        try:
            handle: int = self._agent.createXferReq(
                self._read if direction is TransferDirection.READ else self._write,
                self._new_list(self._segments[local_type], local),
                self._new_list(self._segments[remote_type], remote),
                peer,
                notification,
                self._backends,
            )
        except self._failures as error:
            raise self._mapped(error, TransferError, "NIXL refused the transfer", peer) from None
        return handle

    def post(self, handle: int) -> TransferState:
        """Start the transfer. May block for the whole copy."""
        try:
            return self._state(self._agent.postXferReq(handle, ""))
        except self._failures as error:
            raise self._mapped(error, TransferError, "the transfer failed when it was posted") from None

    def check(self, handle: int) -> TransferState:
        """The transfer's state. Raises `TransferError` or `PeerLost` once it has failed."""
        try:
            return self._state(self._agent.getXferStatus(handle))
        except self._failures as error:
            raise self._mapped(error, TransferError, "the transfer failed") from None

    def telemetry(self, handle: int) -> TransferTelemetry:
        """NIXL's figures for a transfer that is done."""
        try:
            measured = self._agent.getXferTelemetry(handle)
        except self._failures as error:
            raise self._mapped(error, TransferError, "NIXL has no telemetry for the transfer") from None
        return TransferTelemetry(measured.totalBytes, measured.descCount, measured.postDuration, measured.xferDuration)

    def release(self, handle: int) -> None:
        """Free a handle whose transfer is terminal; never one in flight (NIXL would go on copying, unseen)."""
        try:
            self._agent.releaseXferReq(handle)
        except self._failures as error:
            raise self._mapped(error, TransferError, "NIXL could not release the transfer handle") from None

    def notifications(self) -> Mapping[str, Sequence[bytes]]:
        """What peers' transfers notified since the last call, by the name that the sender gave: no proof of who."""
        try:
            notified: Mapping[str, Sequence[bytes]] = self._agent.getNotifs({}, self._backends)
        except self._failures as error:
            raise self._mapped(error, TransferError, "NIXL could not tell its notifications") from None
        return notified

    def _new_agent(self, name: str) -> Any:
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_POLL_TIMEOUT_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        config.captureTelemetry = True
        try:
            return self._nixl.nixlAgent(name, config)
        except self._failures as error:
            raise self._mapped(error, RegistrationError, "the NIXL agent could not be created") from None

    def _new_backend(self, backend: str) -> int:
        transports = os.environ.get("UCX_TLS", "")
        hint = f" with UCX_TLS={transports}" if transports and backend == "UCX" else ""
        try:
            return int(self._agent.createBackend(backend, {}))
        except self._failures as error:
            raise self._mapped(
                error, RegistrationError, f"NIXL's {backend} backend found no usable transport{hint}"
            ) from None

    def _state(self, status: Any) -> TransferState:
        if status == self._success:
            return TransferState.DONE
        if status == self._in_progress:
            return TransferState.IN_PROGRESS
        raise TransferError(f"NIXL reports {status}")

    def _mapped(self, error: Exception, error_type: type[DataPlaneError], what: str, peer: str = "") -> DataPlaneError:
        if isinstance(error, self._nixl.nixlRemoteDisconnectError):
            return PeerLost("the peer's process or connection is gone", peer=peer)
        return error_type(f"{what}: {error}", peer=peer, remedy="see 'nixlbus doctor'")


_ERRORS = (
    "nixlRemoteDisconnectError",
    "nixlBackendError",
    "nixlCancelledError",
    "nixlInvalidParamError",
    "nixlMismatchError",
    "nixlNoTelemetryError",
    "nixlNotAllowedError",
    "nixlNotFoundError",
    "nixlNotPostedError",
    "nixlNotSupportedError",
    "nixlRepostActiveError",
    "nixlUnknownError",
)


def available_plugins() -> dict[str, list[str]]:
    """NIXL's plugins here, each with the memory types it can move. Raises `RegistrationError` without NIXL."""
    nixl = _bindings()
    config = nixl.nixlAgentConfig()
    config.useProgThread = False
    agent = nixl.nixlAgent("nixlbus-doctor", config)
    plugins: dict[str, list[str]] = {}
    for name in agent.getAvailPlugins():
        try:
            plugins[name] = [str(kind).rpartition(".")[2] for kind in agent.getPluginParams(name)[1]]
        except tuple(getattr(nixl, error) for error in _ERRORS):
            plugins[name] = []
    return plugins


def keep_stdout_clean() -> None:
    """Keep NIXL's and UCX's log lines off stdout, where a program's result goes; before nixl is first imported."""
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")


def _bindings() -> Any:
    keep_stdout_clean()
    try:
        import nixl._bindings
    except ImportError as error:
        raise RegistrationError(f"NIXL is not usable here: {error}", remedy="pip install nixl") from None
    return nixl._bindings
