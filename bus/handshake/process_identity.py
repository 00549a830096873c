"""Which process a worker is, and the proof that it is gone.

In: `ProcessIdentity`s that members of the bus signed. Out: a call when one of this machine is gone, by a pidfd, so
that nothing is polled; one descriptor per process that is watched. Only a process of the same boot and pid namespace
can be watched: of any other this module says nothing, and nothing is ever concluded from that.
"""

import asyncio
import logging
import os
from collections.abc import Callable
from pathlib import Path

from schemas.operations import ProcessIdentity

_LOG = logging.getLogger(__name__)
_START_TICKS_FIELD = 22
"""Of /proc/<pid>/stat, counted from 1; see proc(5)."""


def identity_of(pid: int) -> ProcessIdentity:
    """A live process's identity. Raises `ProcessLookupError`, or another `OSError` where /proc hides it."""
    return ProcessIdentity(
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        pid_namespace=os.readlink("/proc/self/ns/pid"),
        pid=pid,
        start_ticks=_start_ticks(pid),
    )


class ProcessWatch:
    """Watches processes of this machine, on one event loop."""

    def __init__(self) -> None:
        self._own = identity_of(os.getpid())
        self._loop = asyncio.get_running_loop()
        self._is_closed = False
        self._watched: dict[ProcessIdentity, tuple[int, list[Callable[[], None]]]] = {}

    @property
    def own(self) -> ProcessIdentity:
        """This process."""
        return self._own

    @property
    def num_watched(self) -> int:
        """Processes whose end would be noticed."""
        return len(self._watched)

    def when_gone(self, process: ProcessIdentity, callback: Callable[[], None]) -> bool:
        """Call back when `process` is gone, at once if it is; False if it can't be watched from here."""
        if self._is_closed or not self._is_near(process):
            return False
        if process in self._watched:
            self._watched[process][1].append(callback)
            return True
        descriptor = -1
        try:
            descriptor = os.pidfd_open(process.pid)
            is_gone = _start_ticks(process.pid) != process.start_ticks  # or the pid is somebody else's by now
        except ProcessLookupError:
            is_gone = True
        except OSError as error:  # no descriptors left, /proc hidden: that is proof of nothing
            _LOG.warning("the process of a peer can't be watched: %s", error)
            if descriptor >= 0:
                os.close(descriptor)
            return False
        if is_gone:
            if descriptor >= 0:
                os.close(descriptor)
            self._loop.call_soon(callback)
            return True
        self._watched[process] = (descriptor, [callback])
        self._loop.add_reader(descriptor, self._on_gone, process)
        return True

    def close(self) -> None:
        """Watch nothing any more."""
        self._is_closed = True
        for descriptor, _ in self._watched.values():
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._watched.clear()

    def _is_near(self, process: ProcessIdentity) -> bool:
        own = self._own
        return (process.boot_id, process.pid_namespace) == (own.boot_id, own.pid_namespace)

    def _on_gone(self, process: ProcessIdentity) -> None:
        descriptor, callbacks = self._watched.pop(process)
        self._loop.remove_reader(descriptor)
        os.close(descriptor)
        for callback in callbacks:
            callback()


def _start_ticks(pid: int) -> int:
    """Raises `ProcessLookupError` when there is no such process, another `OSError` when that can't be told."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        os.kill(pid, 0)  # /proc may hide it: raises ProcessLookupError only if it is gone
        raise PermissionError(f"/proc tells nothing of process {pid}") from None
    after_name = text.rpartition(")")[2].split()  # the name may hold blanks and brackets
    return int(after_name[_START_TICKS_FIELD - 3])
