"""Log lines that can be laid beside a trace: one line per record, with the trace id.

In: records of the standard `logging`. Out: lines on stderr:
`2026-01-31T12:00:00.123Z WARNING decode bus.control_plane reconnecting trace=4bf9...`
Invariants: a record is one line (line breaks are escaped), except that at level DEBUG a traceback follows in
full.
Leaves out: log export over OTLP, files, rotation: whoever runs the process collects its stderr.
"""

import logging
import sys
import time
import traceback

from observability.tracing import current_trace_id, service_name


def configure_logging(level: int | str = logging.INFO) -> None:
    """Send log records of `level` and above to stderr. A second call replaces the first.

    Raises:
        ValueError: there is no such level.
    """
    root = logging.getLogger()
    root.setLevel(level.upper() if isinstance(level, str) else level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter())
    for earlier in root.handlers[:]:
        if isinstance(earlier.formatter, _LineFormatter):
            root.removeHandler(earlier)
    root.addHandler(handler)


class _LineFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(filter(None, (self._head(record), record.getMessage(), self._tail(record))))
        line = line.replace("\r", "\\r").replace("\n", "\\n")
        if record.exc_info and logging.getLogger().level <= logging.DEBUG:
            line += "\n" + self.formatException(record.exc_info)
        return line

    def _head(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        milliseconds = min(999, int(record.msecs))
        return f"{clock}.{milliseconds:03d}Z {record.levelname} {service_name() or '-'} {record.name}"

    def _tail(self, record: logging.LogRecord) -> str:
        trace_id = current_trace_id()
        parts = [f"trace={trace_id}"] if trace_id else []
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            where = f" at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
            parts.append(f"error={type(error).__name__}: {error}{where}")
        return " ".join(parts)
