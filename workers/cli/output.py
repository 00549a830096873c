"""What the commands print: people read stderr and tables, programs read one JSON value on stdout.

In: results, progress and errors. Out: with `--json` exactly one JSON object (or a line per event) on stdout and
nothing else there; without it, text. An error is one line, or `{"error": …}` with `--json`, and exit status 1.
"""

import json
import sys
from typing import Any

from rich.console import Console
from rich.table import Table

from bus import BusError, RemoteFault, RequestRefused
from workers.process import Progress

_WIDEST = 10_000
"""Characters; wider than any table."""


class Output:
    """Where one command writes."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console(stderr=as_json, highlight=False, soft_wrap=False)

    def result(self, value: dict[str, Any] | list[Any]) -> None:
        """The command's result, with `--json`."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def text(self, *renderables: Any, end: str = "\n", wrap: bool = True) -> None:
        """Something to read, without `--json`. Lines are folded at the terminal's width if `wrap`."""
        if not self.as_json:
            self.console.print(*renderables, end=end, soft_wrap=not wrap)

    def table(self, table: Table) -> None:
        """A table at its full width, without `--json`: a narrower terminal wraps its lines, and nothing is cut."""
        needed = self.console.measure(table, options=self.console.options.update(width=_WIDEST)).maximum
        self.console.width = max(self.console.width, needed)
        self.text(table)

    def note(self, text: str) -> None:
        """A remark on stderr."""
        Console(stderr=True, highlight=False).print(text, style="dim", soft_wrap=True)

    def progress(self, role: str, progress: Progress) -> None:
        """A worker's step, on stderr."""
        if progress.step in ("ready", "failed"):
            self.note(f"  {role:<12} {progress.step:<8} {progress.detail}")

    def error(self, error: BaseException) -> None:
        """Why the command failed."""
        if self.as_json:
            self.result({"error": error_fields(error)})
        else:
            Console(stderr=True, highlight=False).print(f"error: {error}", style="red", soft_wrap=True, markup=False)


def error_fields(error: BaseException) -> dict[str, Any]:
    """An error for programs."""
    if isinstance(error, RemoteFault):
        fault = error.fault
        return {
            "code": fault.code,
            "message": fault.message,
            "remedy": fault.remedy,
            "worker_id": fault.worker_id,
            "trace_id": fault.trace_id,
        }
    if isinstance(error, BusError):
        code = error.refusal_code if isinstance(error, RequestRefused) else error.code
        return {"code": code.value, "message": error.what, "remedy": error.remedy}
    return {"code": "failed", "message": str(error), "remedy": ""}
