"""The NIXL agent of this process: a thin, typed wrapper, and the only module that imports nixl.

In: addresses, lengths and an operation. Out: transfer handles and their states; NIXL's exceptions become ours here.
Invariants: STRICT synchronisation (the default segfaults with two threads); a progress thread whose poll timeout is
100 ms (Python's own wrapper hard-codes 0 and burns 82 % of a core; without the thread a silent target never finishes
the wire-up); telemetry on, so that the bytes of a transfer are NIXL's count and not ours; no pickled descriptors.
Leaves out: when to post and who waits (`transfer`).
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

from bus.data_plane.addressing import CopyPair
from bus.errors import DataPlaneError, PeerLost, RegistrationError, TransferError

PROGRESS_POLL_TIMEOUT_US = 100_000
"""NIXL's pthrDelay: wake-ups come by file descriptor, this only bounds the wait (idle cost 0.06 % of a core)."""
DEFAULT_BACKEND = "UCX"


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
        self._agent = self._new_agent(name)
        self._backend_handle = self._new_backend(backend)

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent and its registered memory. A capability: never logged."""
        return bytes(self._agent.getLocalMD())

    def register(self, address: int, length_bytes: int, memory_type: str, device_id: int) -> object:
        """Register memory; the returned token deregisters it. Raises `RegistrationError`."""
        descriptors = self._nixl.nixlRegDList(self._memory(memory_type), [(address, length_bytes, device_id, "")])
        with self._mapped(RegistrationError, f"could not register {length_bytes:,} bytes of {memory_type}"):
            self._agent.registerMem(descriptors, [self._backend_handle])
        return descriptors

    def deregister(self, token: object) -> None:
        """Forget registered memory. No fence: a peer's transfer under way still lands."""
        with self._mapped(RegistrationError, "could not deregister memory"):
            self._agent.deregisterMem(token, [self._backend_handle])

    def load_peer(self, metadata: bytes) -> str:
        """Make a peer known; returns its agent name. Only for metadata whose authenticity was proved."""
        with self._mapped(PeerLost, "NIXL refused the peer's agent metadata"):
            return bytes(self._agent.loadRemoteMD(metadata)).decode()

    def create_transfer(
        self,
        direction: TransferDirection,
        pairs: Sequence[CopyPair],
        peer: str,
        local_type: str = "DRAM",
        remote_type: str = "DRAM",
    ) -> int:
        """A transfer handle, not yet posted. Raises `TransferError` or `PeerLost`."""
        local = [(pair.local_address, pair.length_bytes, pair.local_device_id) for pair in pairs]
        remote = [(pair.remote_address, pair.length_bytes, pair.remote_device_id) for pair in pairs]
        operation = self._nixl.NIXL_READ if direction is TransferDirection.READ else self._nixl.NIXL_WRITE
        with self._mapped(TransferError, "NIXL refused the transfer", peer):
            return int(
                self._agent.createXferReq(
                    operation,
                    self._nixl.nixlXferDList(self._memory(local_type), local),
                    self._nixl.nixlXferDList(self._memory(remote_type), remote),
                    peer,
                    "",
                    [self._backend_handle],
                )
            )

    def post(self, handle: int) -> TransferState:
        """Start the transfer. May block for the whole copy."""
        with self._mapped(TransferError, "the transfer failed when it was posted"):
            return self._state(self._agent.postXferReq(handle, ""))

    def check(self, handle: int) -> TransferState:
        """The transfer's state. Raises `TransferError` or `PeerLost` once it has failed."""
        with self._mapped(TransferError, "the transfer failed"):
            return self._state(self._agent.getXferStatus(handle))

    def telemetry(self, handle: int) -> TransferTelemetry:
        """NIXL's figures for a transfer that is done."""
        with self._mapped(TransferError, "NIXL has no telemetry for the transfer"):
            measured = self._agent.getXferTelemetry(handle)
        return TransferTelemetry(
            int(measured.totalBytes),
            int(measured.descCount),
            _microseconds(measured.postDuration),
            _microseconds(measured.xferDuration),
        )

    def release(self, handle: int) -> None:
        """Free a handle whose transfer is terminal; never one in flight (NIXL would go on copying, unseen)."""
        with self._mapped(TransferError, "NIXL could not release the transfer handle"):
            self._agent.releaseXferReq(handle)

    def _new_agent(self, name: str) -> Any:
        config = self._nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = PROGRESS_POLL_TIMEOUT_US
        config.syncMode = self._nixl.NIXL_THREAD_SYNC_STRICT
        config.captureTelemetry = True
        with self._mapped(RegistrationError, "the NIXL agent could not be created"):
            return self._nixl.nixlAgent(name, config)

    def _new_backend(self, backend: str) -> int:
        transports = os.environ.get("UCX_TLS", "")
        hint = f" with UCX_TLS={transports}" if transports and backend == "UCX" else ""
        with self._mapped(RegistrationError, f"NIXL's {backend} backend found no usable transport{hint}"):
            return int(self._agent.createBackend(backend, {}))

    def _memory(self, memory_type: str) -> Any:
        return self._nixl.VRAM_SEG if memory_type == "VRAM" else self._nixl.DRAM_SEG

    def _state(self, status: Any) -> TransferState:
        if status == self._nixl.NIXL_SUCCESS:
            return TransferState.DONE
        if status == self._nixl.NIXL_IN_PROG:
            return TransferState.IN_PROGRESS
        raise TransferError(f"NIXL reports {status}")

    @contextmanager
    def _mapped(self, error_type: type[DataPlaneError], what: str, peer: str = "") -> Iterator[None]:
        try:
            yield
        except self._nixl.nixlRemoteDisconnectError:
            raise PeerLost("the peer's process or connection is gone", peer=peer) from None
        except tuple(getattr(self._nixl, name) for name in _ERRORS) as error:
            raise error_type(f"{what}: {error}", peer=peer, remedy="see 'nixlbus doctor'") from None


_ERRORS = (
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


def _microseconds(duration: Any) -> int:
    return int(duration.total_seconds() * 1e6) if hasattr(duration, "total_seconds") else int(duration)
