"""What the standard OTEL_* variables ask of us, beyond what OpenTelemetry's own classes read themselves.

In: the environment. Out: whether to export spans, and numbers with our defaults.
Invariants: imports nothing, so that asking costs a process without a collector nothing; a bad value is warned
of by name and ignored, as the specification wants, since a worker mustn't fail for its tracing.
Leaves out: endpoints, TLS, samplers and resources: the SDK reads them.
Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/
"""

import logging
import os

logger = logging.getLogger(__name__)


def is_export_wanted() -> bool:
    """Return whether there is an endpoint, nothing turns tracing off, and the protocol is one we have."""
    if _env("OTEL_SDK_DISABLED").lower() == "true":
        return False
    if not (_env("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or _env("OTEL_EXPORTER_OTLP_ENDPOINT")):
        return False
    exporters = [name.strip().lower() for name in (_env("OTEL_TRACES_EXPORTER") or "otlp").split(",")]
    protocol = _env("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL") or _env("OTEL_EXPORTER_OTLP_PROTOCOL") or "grpc"
    if "otlp" in exporters and protocol == "grpc":
        return True
    if exporters != ["none"]:
        logger.warning(
            "tracing is off: of OTEL_TRACES_EXPORTER only otlp, and of OTEL_EXPORTER_OTLP_PROTOCOL only grpc "
            "is supported, not %s over %s",
            ",".join(exporters),
            protocol,
        )
    return False


def positive_int(name: str, default: int) -> int:
    """Return a variable as a number from 1 up; `default` if it is unset, empty or no such number."""
    text = _env(name)
    if not text:
        return default
    if text.isdecimal() and int(text) > 0:
        return int(text)
    logger.warning("%s must be a positive integer, not %r: using %d", name, text, default)
    return default


def _env(name: str) -> str:
    return os.environ.get(name, "").strip()
