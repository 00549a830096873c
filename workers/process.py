"""The life of one worker process: open the bus, start the worker, serve until told to stop, drain.

In: how the worker is made, and settings. Out: `Progress` for whoever started it, and an exit status. A start that fails
says why in one line; SIGTERM, SIGINT, a lost parent or too much fenced memory end it; a lost NATS connection doesn't.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

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


async def run_worker(spec: WorkerSpec, report: Reporter, stop: asyncio.Event) -> int:
    """Run one role of the packaged graph until `stop`; returns the exit status."""
    if spec.otlp_endpoint is not None:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = spec.otlp_endpoint
    try:
        worker_type = role_class(spec.role)
    except START_ERRORS as error:
        report(Progress("failed", str(error)))
        return 1
    return await live(worker_type, lambda bus: worker_type(bus, spec.settings), spec.bus, spec.settings, report, stop)


async def live(
    worker_type: type[Worker],
    make: Callable[[Bus], Worker],
    config: BusConfig,
    settings: ProcessSettings,
    report: Reporter,
    stop: asyncio.Event,
) -> int:
    """Run the worker that `make` returns until `stop`; returns the exit status."""
    configure_logging(settings.log_level)
    tracing.configure(worker_type.role, instance_id=config.worker_id, service_version=package_version())
    try:
        report(Progress("connecting", config.worker_id))
        bus_opened = Bus.open(config, data_plane=worker_type.needs_data_plane, drain_timeout_s=settings.drain_timeout_s)
        async with bus_opened as bus:
            worker = make(bus)
            async with _health(worker, settings):
                status = await _serve(worker, settings, report, stop)
    except START_ERRORS as error:
        report(Progress("failed", str(error)))
        return 1
    finally:
        await asyncio.to_thread(tracing.shutdown)
    report(Progress("stopped"))
    return status


async def _serve(worker: Worker, settings: ProcessSettings, report: Reporter, stop: asyncio.Event) -> int:
    report(Progress("starting", worker.bus.worker_id))
    async with worker.serving(settings.drain_timeout_s):
        settle_heap()
        report(Progress("ready", str(worker.metadata().get("url", worker.bus.worker_id))))
        return await _until_stopped(worker.bus, stop)


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
    """Set `stop` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
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
        stop_on_signals(stop)
        config, settings = BusConfig.from_env(worker_type.role), ProcessSettings.from_env()
        make: Callable[[Bus], Worker] = lambda bus: worker_type(bus, *dependencies, **more)  # noqa: E731
        return await live(worker_type, make, config, settings, tell, stop)

    def tell(progress: Progress) -> None:
        print(f"{worker_type.role} {progress.step} {progress.detail}".rstrip(), file=sys.stderr)  # noqa: T201

    try:
        return uvloop.run(main())
    except START_ERRORS as error:
        tell(Progress("failed", str(error)))
        return 1
