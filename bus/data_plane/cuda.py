"""The order between CUDA streams and NIXL, which knows nothing of streams.

In: a device number. Out: a mark in the stream that was current when an operation began; NIXL may post once everything
before the mark is done. Asking also makes the device current for the calling thread: without that UCX silently drops
NVLink. Imported by every transfer, so torch only when there is a mark to make. Not run on a GPU yet.
"""

from typing import Any


class StreamMark:
    """A point in the current stream of a device. Raises what torch raises without CUDA."""

    __slots__ = ("_device_id", "_event")

    def __init__(self, device_id: int) -> None:
        import torch

        self._device_id = device_id
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device_id))

    def is_reached(self) -> bool:
        """Make the device current in this thread, and say whether the stream has come to the mark; never blocks."""
        import torch

        torch.cuda.set_device(self._device_id)
        return bool(self._event.query())
