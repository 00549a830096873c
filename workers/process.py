"""The life of one worker process: open the bus, start the role, serve until told to stop, drain.

In: a role's name and settings. Out: `Progress` for whoever started it, and an exit status. A start that fails says why
in one line; SIGTERM, SIGINT, a lost parent, a NATS connection that is gone for good or too much fenced memory end it.
"""

import asyncio
import contextlib
import gc
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from bus import Bus, BusConfig, BusError, ConfigError, KeyFileError, RolesFileError
from observability import tracing
from observability.logs import configure_logging
from observability.receiver import ReceiverBindError
from schemas.subjects import InvalidIdentifier
from workers.models.vision_language_model import UnsupportedModel
from workers.roles import role_class
from workers.settings import Settings
from workers.worker import Worker, package_version

DRAIN_TIMEOUT_S = 10.0
"""A request in flight gets this long after SIGTERM; Kubernetes kills after 30 s unless told otherwise."""

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


@dataclass(frozen=True)
class WorkerSpec:
    """Everything a worker process is started with."""

    role: str
    bus: BusConfig
    settings: Settings
    otlp_endpoint: str | None = None
    """Where its spans go: "" nowhere, None as the environment says."""


async def run_worker(spec: WorkerSpec, report: Callable[[Progress], None], stop: asyncio.Event) -> int:
    """Run one worker until `stop`; returns the exit status."""
    if spec.otlp_endpoint is not None:
        os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = spec.otlp_endpoint
    configure_logging(spec.settings.log_level)
    tracing.configure(spec.role, instance_id=spec.bus.worker_id, service_version=package_version())
    try:
        worker_type = role_class(spec.role)
        report(Progress("connecting", spec.bus.worker_id))
        async with Bus.open(spec.bus, data_plane=worker_type.needs_data_plane) as bus:
            status = await _serve(worker_type(bus, spec.settings), report, stop)
    except START_ERRORS as error:
        report(Progress("failed", str(error)))
        return 1
    finally:
        await asyncio.to_thread(tracing.shutdown)
    report(Progress("stopped"))
    return status


async def _serve(worker: Worker, report: Callable[[Progress], None], stop: asyncio.Event) -> int:
    report(Progress("starting", worker.bus.worker_id))
    try:
        await worker.start()
        await worker.serve()
        settle_heap()
        report(Progress("ready", str(worker.metadata().get("url", worker.bus.worker_id))))
        return await _until_stopped(worker.bus, stop)
    finally:
        await worker.bus.drain(DRAIN_TIMEOUT_S)
        await worker.stop()


def settle_heap() -> None:
    """Take what was loaded until now out of the collector's sight: a full collection of a heap with torch in it stops
    the event loop for a tenth of a second, whenever enough young objects have survived.
    """
    gc.collect()
    gc.freeze()


async def _until_stopped(bus: Bus, stop: asyncio.Event) -> int:
    reasons = {"NATS closed the connection for good": bus.connection_lost}
    if bus.has_data_plane:
        reasons["too much memory is fenced"] = bus.overrun
    for reason in reasons.values():
        reason.add_done_callback(lambda _: stop.set())
    await stop.wait()
    met = {what: reason.result() for what, reason in reasons.items() if reason.done()}
    for what, detail in met.items():
        _LOG.error("%s: %s", what, detail)
    return 1 if met else 0


def stop_on_signals(stop: asyncio.Event) -> None:
    """Set `stop` on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
