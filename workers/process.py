"""The life of one worker process: open the bus, start the worker, serve until told to stop, drain.

In: how the worker is made, and settings. Out: `Progress` for whoever started it, and an exit status. A start that fails
says why in one line; SIGTERM, SIGINT, a lost parent or too much fenced memory end it; a lost NATS connection doesn't.
Told to stop while it starts, it gives the start up; while it drains, a second signal cuts the drain short.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from bus import Bus, BusConfig, BusError, ConfigError, KeyFileError, RolesFileError
from observability import tracing
from observability.logs import configure_logging
from observability.receiver import ReceiverBindError
from schemas.subjects import InvalidIdentifier
from workers.health import health_server
from workers.models.vision_language_model import UnsupportedModel
from workers.roles import role_class
from workers.settings import ProcessSettings, Settings
from workers.worker import Worker, package_version

START_ERRORS = (
    BusError,
    ConfigError,
    InvalidIdentifier,
    KeyFileError,
    ReceiverBindError,
    RolesFileError,
    UnsupportedModel,
    ImportError,
    OSError,
)
"""What can keep a worker from starting and is told in one line; anything else is a defect and shows its traceback."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_SIGNAL_S = 0.5
"""A second signal within this is the first again: a terminal's Ctrl-C reaches a group, whose first process may pass it
on."""
END_WITHIN_S = 1.0
"""How long the rest of the process's end may take after a start that was given up or a drain that was cut short."""

_LOG = logging.getLogger(__name__)


class Progress(NamedTuple):
    """A step in the life of a worker: "connecting", "starting", "ready", "failed", "stopped"."""

    step: str
    detail: str = ""


Reporter = Callable[[Progress], None]


@dataclass(frozen=True)
class WorkerSpec:
    """Everything that a worker of the packaged graph is started with."""

    role: str
    bus: BusConfig
    settings: Settings
    otlp_endpoint: str | None = None
    """Where its spans go: "" nowhere, None as the environment says."""


class Signals:
    """SIGTERM and SIGINT of a process that is one worker's own.

    The first sets `stop`, the second `hurry`, and the third has the system's way: it kills.
    """

    def __init__(self, stop: asyncio.Event) -> None:
        self.hurry = asyncio.Event()
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._asked_at_s: float | None = None
        for number in STOP_SIGNALS:
            with contextlib.suppress(NotImplementedError):
                self._loop.add_signal_handler(number, self._on_signal)

    def end_soon(self, status: int) -> None:
        """End the process in a moment, whatever its threads do: one that loads a model can't be stopped."""
        ending = threading.Timer(END_WITHIN_S, os._exit, (status,))
        ending.daemon = True
        ending.start()

    def _on_signal(self) -> None:
        now_s = self._loop.time()
        if self._asked_at_s is None:
            self._asked_at_s = now_s
            self._stop.set()
        elif now_s - self._asked_at_s > SAME_SIGNAL_S:
            self.hurry.set()
            for number in STOP_SIGNALS:
                self._loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_DFL)


async def run_worker(spec: WorkerSpec, report: Reporter, stop: asyncio.Event, signals: Signals | None = None) -> int:
    """Run one role of the packaged graph until `stop`; returns the exit status. `signals`: as for `live`."""
    if spec.otlp_endpoint is not None:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = spec.otlp_endpoint
    try:
        worker_type = role_class(spec.role)
    except START_ERRORS as error:
        report(Progress("failed", str(error)))
        return 1
    return await live(
        worker_type, lambda bus: worker_type(bus, spec.settings), spec.bus, spec.settings, report, stop, signals
    )


async def live(
    worker_type: type[Worker],
    make: Callable[[Bus], Worker],
    config: BusConfig,
    settings: ProcessSettings,
    report: Reporter,
    stop: asyncio.Event,
    signals: Signals | None = None,
) -> int:
    """Run the worker that `make` returns until `stop`; returns the exit status.

    0 if it drained, or had not begun to serve; 1 if it could not start, or was stopped before it had drained.
    `signals`: of a process that is this worker's own, and ends with it.
    """
    configure_logging(settings.log_level)
    tracing.configure(worker_type.role, instance_id=config.worker_id, service_version=package_version())
    status = 0
    try:
        report(Progress("connecting", config.worker_id))
        async with _Interruption(stop, signals) as interruption:
            opened = Bus.open(config, data_plane=worker_type.needs_data_plane, drain_timeout_s=settings.drain_timeout_s)
            async with opened as bus:
                worker = make(bus)
                async with _health(worker, settings):
                    status = await _serve(worker, settings, report, stop, interruption)
    except START_ERRORS as error:
        report(Progress("failed", str(error)))
        return 1
    finally:
        await asyncio.to_thread(tracing.shutdown)
    if interruption.has_struck:
        status = 1 if interruption.is_serving else 0
        if signals:
            signals.end_soon(status)
    report(Progress("stopped", interruption.detail))
    return status


async def _serve(
    worker: Worker, settings: ProcessSettings, report: Reporter, stop: asyncio.Event, interruption: "_Interruption"
) -> int:
    report(Progress("starting", worker.bus.worker_id))
    async with worker.serving(settings.drain_timeout_s):
        interruption.is_serving = True
        settle_heap()
        report(Progress("ready", str(worker.metadata().get("url", worker.bus.worker_id))))
        return await _until_stopped(worker.bus, stop)


class _Interruption:
    """Cancels its body where `stop` comes before `is_serving`, and when it is to hurry; that cancellation ends here."""

    def __init__(self, stop: asyncio.Event, signals: Signals | None) -> None:
        self.is_serving = False
        self._stop = stop
        self._hurry = signals.hurry if signals else asyncio.Event()
        self._num_cancels = 0

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watching = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> bool:
        self._watching.cancel()
        for _ in range(self._num_cancels):
            self._task.uncancel()
        return self.has_struck and kind is asyncio.CancelledError and not self._task.cancelling()

    @property
    def has_struck(self) -> bool:
        """Whether the body was cancelled."""
        return self._num_cancels > 0

    @property
    def detail(self) -> str:
        """What it prevented, for people."""
        if not self.has_struck:
            return ""
        return "before it had drained" if self.is_serving else "before it was ready"

    async def _watch(self) -> None:
        await self._stop.wait()
        if not self.is_serving:
            self._cancel()
        await self._hurry.wait()
        self._cancel()

    def _cancel(self) -> None:
        self._num_cancels += 1
        self._task.cancel()


@contextlib.asynccontextmanager
async def _health(worker: Worker, settings: ProcessSettings) -> AsyncIterator[None]:
    if settings.health_port < 0:
        yield
        return
    async with health_server(settings.health_host, settings.health_port, lambda: worker.not_ready) as url:
        _LOG.info("health at %s", url)
        yield


def settle_heap() -> None:
    """Take what was loaded until now out of the collector's sight: a full collection of a heap with torch in it stops
    the event loop for a tenth of a second, whenever enough young objects have survived.
    """
    gc.collect()
    gc.freeze()


async def _until_stopped(bus: Bus, stop: asyncio.Event) -> int:
    if bus.has_data_plane:
        bus.overrun.add_done_callback(lambda _: stop.set())
    await stop.wait()
    if bus.has_data_plane and bus.overrun.done():
        _LOG.error("too much memory is fenced: %s", bus.overrun.result())
        return 1
    return 0


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT, each time; for a process that is more than a worker."""
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)


def run(worker_type: type[Worker], *dependencies: Any, **more: Any) -> int:
    """Run a worker in this process until SIGTERM or Ctrl-C, configured by the environment; returns the exit status.

    `dependencies` are what its constructor takes besides the bus. What keeps it from starting is told on stderr.
    """
    import sys

    import uvloop

    async def main() -> int:
        stop = asyncio.Event()
        signals = Signals(stop)
        config, settings = BusConfig.from_env(worker_type.role), ProcessSettings.from_env()
        make: Callable[[Bus], Worker] = lambda bus: worker_type(bus, *dependencies, **more)  # noqa: E731
        return await live(worker_type, make, config, settings, tell, stop, signals)

    def tell(progress: Progress) -> None:
        print(f"{worker_type.role} {progress.step} {progress.detail}".rstrip(), file=sys.stderr)  # noqa: T201

    try:
        return uvloop.run(main())
    except START_ERRORS as error:
        tell(Progress("failed", str(error)))
        return 1
