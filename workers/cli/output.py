"""What the commands print: people read stderr and tables, programs read one JSON value on stdout.

In: results, progress and errors. Out: with `--json` exactly one JSON object (or a line per event) on stdout and
nothing else there; without it, text. An error is one line, or `{"error": …}` with `--json`, and exit status 1.
Invariants: text is printed as it is (no markup, no names of emoji); where stdout is no terminal nothing is folded.
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
        self.console = _console(stderr=as_json)

    def result(self, value: dict[str, Any] | list[Any]) -> None:
        """The command's result, with `--json`."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
            sys.stdout.flush()

    def text(self, *renderables: Any, end: str = "\n", wrap: bool = True) -> None:
        """Something to read, without `--json`. Lines are folded at the terminal's width, if `wrap` and there is one."""
        if not self.as_json:
            self.console.print(*renderables, end=end, soft_wrap=not wrap or not self.console.is_terminal)

    def verbatim(self, text: str, end: str = "\n") -> None:
        """Text of others, without `--json`: to the character, tabs included."""
        if not self.as_json:
            self.console.file.write(text + end)
            self.console.file.flush()

    def table(self, table: Table, *, whole: bool = False) -> None:
        """A table, without `--json`. Cells are folded where a terminal is narrow, unless it is to be `whole`: then the
        terminal wraps its lines.
        """
        width = self.console.width
        if whole or not self.console.is_terminal:
            needed = self.console.measure(table, options=self.console.options.update(width=_WIDEST)).maximum
            self.console.width = max(width, needed)
        self.text(table)
        self.console.width = width

    def note(self, text: str) -> None:
        """A remark on stderr."""
        _console(stderr=True).print(text, style="dim", soft_wrap=True)

    def progress(self, role: str, progress: Progress) -> None:
        """A worker's step, on stderr."""
        if progress.step in ("ready", "failed"):
            self.note(f"  {role:<12} {progress.step:<8} {progress.detail}")

    def error(self, error: BaseException) -> None:
        """Why the command failed."""
        if self.as_json:
            self.result({"error": error_fields(error)})
        else:
            _console(stderr=True).print(f"error: {error}", style="red", soft_wrap=True)


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


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
