"""`Descriptor`: local memory as its owner has it, before anybody registered it.

In: a torch tensor (CPU, CUDA), a numpy array, anything with a buffer, or an address with its owner. Out: address,
length, device, whether it may be written, and what is known of its layout. The bytes are never copied, so memory that
isn't contiguous is an error. A descriptor keeps its memory alive and may be used for any number of operations.
"""

from collections.abc import Sequence
from enum import Enum
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from bus.errors import InvalidDescriptor, NotContiguous
from schemas.operations import TensorLayout

if TYPE_CHECKING:
    import numpy as np
    import torch


class DeviceKind(Enum):
    """Where memory lives, as torch names it."""

    HOST = "cpu"
    CUDA = "cuda"


class Device:
    """A device by torch's name: `Device("cpu")`, `Device("cuda")`, `Device("cuda:1")`. Raises `InvalidDescriptor`."""

    __slots__ = ("id", "kind")

    def __init__(self, name: str) -> None:
        kind, _, number = name.partition(":")
        try:
            self.kind = DeviceKind(kind)
            self.id = int(number or 0)
        except ValueError:
            raise InvalidDescriptor(f"{name[:40]!r} is no device", remedy="use cpu or cuda:<number>") from None
        if self.id < 0 or (self.kind is DeviceKind.HOST and self.id):
            raise InvalidDescriptor(f"{name[:40]!r} is no device", remedy="use cpu or cuda:<number>")

    @property
    def memory_type(self) -> str:
        """NIXL's name for its memory."""
        return "DRAM" if self.kind is DeviceKind.HOST else "VRAM"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and (self.kind, self.id) == (other.kind, other.id)

    def __hash__(self) -> int:
        return hash((self.kind, self.id))

    def __repr__(self) -> str:
        return f"Device({self.kind.value!r})" if self.kind is DeviceKind.HOST else f"Device('cuda:{self.id}')"


HOST = Device("cpu")


class Descriptor:
    """Contiguous local memory.

    `data`: a torch tensor, a numpy array, bytes, bytearray, memoryview or whatever else has a buffer, or a pair
    (address, length in bytes), for which `owner` must be the object whose life is the memory's, and `device` says where
    it is. Attributes: `address`, `num_bytes`, `device`, `is_writable`, `layout` (dtype and shape; None for bytes).
    Raises `NotContiguous`, `InvalidDescriptor`.
    """

    __slots__ = ("__weakref__", "address", "device", "is_writable", "layout", "num_bytes", "owner", "storage")

    def __init__(self, data: Any, *, device: Device | str = HOST, owner: object = None) -> None:
        self.address = 0
        self.num_bytes = 0
        self.is_writable = True
        self.layout: TensorLayout | None = None
        self.device = device if isinstance(device, Device) else Device(device)
        self.owner: object = owner
        """Referenced for as long as the descriptor lives."""
        self.storage: tuple[object, int, int] | None = None
        """The whole allocation that the bytes lie in, where it is known: its owner, address and length."""
        if isinstance(data, tuple):
            self._describe_address(data)
        elif hasattr(data, "untyped_storage"):
            self._describe_tensor(data)
        else:
            self._describe_buffer(data)
        if not self.num_bytes or not self.address:
            raise InvalidDescriptor("an operation needs memory of at least one byte")

    def _describe_tensor(self, tensor: "torch.Tensor") -> None:
        if not tensor.is_contiguous():
            raise NotContiguous(
                f"a tensor of shape {tuple(tensor.shape)} and strides {tensor.stride()} is not contiguous",
                remedy="pass tensor.contiguous() and keep it; nixlbus makes no hidden copies",
            )
        if tensor.device.type not in ("cpu", "cuda"):
            raise InvalidDescriptor(f"a tensor on {tensor.device} can't be moved", remedy="use cpu or cuda")
        self.owner = tensor
        self.device = Device(str(tensor.device))
        self.address, self.num_bytes = tensor.data_ptr(), tensor.nbytes
        self.layout = layout_of(tensor.dtype, tensor.shape)
        storage = tensor.untyped_storage()
        self.storage = (storage, storage.data_ptr(), storage.nbytes())

    def _describe_buffer(self, data: Any) -> None:
        import numpy as np

        if isinstance(data, np.ndarray):
            array = data
            if array.dtype.hasobject or not array.dtype.isnative:
                raise InvalidDescriptor(f"an array of {array.dtype!r} can't be moved: its bytes mean nothing elsewhere")
            if array.dtype != np.uint8 or array.ndim != 1:
                self.layout = TensorLayout(dtype=array.dtype.name, shape=list(array.shape))
        else:
            try:
                array = np.frombuffer(data, dtype=np.uint8)
            except (TypeError, ValueError, BufferError) as error:
                raise InvalidDescriptor(
                    f"{type(data).__name__} can't be described: {error}",
                    remedy="pass a torch tensor, a numpy array, a bytes-like, or (address, length) with owner=",
                ) from None
        if not array.flags.c_contiguous:
            raise NotContiguous(
                f"an array of shape {array.shape} and strides {array.strides} is not contiguous",
                remedy="pass numpy.ascontiguousarray(array) and keep it; nixlbus makes no hidden copies",
            )
        self.owner = array
        self.is_writable = bool(array.flags.writeable)
        self.address, self.num_bytes = int(array.ctypes.data), int(array.nbytes)
        root = _root(array)
        if root.flags.c_contiguous:
            self.storage = (root, int(root.ctypes.data), int(root.nbytes))

    def _describe_address(self, data: tuple[Any, ...]) -> None:
        if len(data) != 2 or not all(isinstance(part, int) and part > 0 for part in data):
            raise InvalidDescriptor("an address is described by (address, length in bytes)")
        if self.owner is None:
            raise InvalidDescriptor("an address needs owner=, the object that keeps its memory alive")
        self.address, self.num_bytes = data
        self.storage = (self.owner, self.address, self.num_bytes)

    def __repr__(self) -> str:
        return f"Descriptor({self.num_bytes:,} bytes on {self.device!r})"


@lru_cache
def _dtype_name(dtype: "torch.dtype") -> str:
    return str(dtype).removeprefix("torch.")


def layout_of(dtype: "torch.dtype", shape: Sequence[int]) -> TensorLayout | None:
    """Of a tensor; None for one of bytes (uint8) in one dimension, which may hold anything."""
    name = _dtype_name(dtype)
    return None if name == "uint8" and len(shape) == 1 else TensorLayout(dtype=name, shape=list(shape))


def _root(array: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    import numpy as np

    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
