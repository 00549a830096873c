"""A page that a reader follows in a terminal, followed by a program: files written, commands run, what is shown seen.

In: a page. Its `python` blocks begin with `# name.py` and are files; its `sh` blocks are commands; a `text` block is
what the commands above it print, in any order. Out: an error for a command that fails or a line that isn't seen.
All commands run in one bash, so that exports and background jobs last. Numbers, the digits of a worker's id and the
bars of a waterfall may differ from the page's; nothing else may.
"""

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_WORKER_ID = re.compile(r"\b([a-z]+)-[0-9a-f]{6}\b")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_BARS = re.compile("[\u2580-\u259f]")


@dataclass(frozen=True)
class Step:
    """One fenced block."""

    language: str
    body: str


def steps_of(page: str) -> list[Step]:
    """The page's blocks in order; those without a language are pictures and left out."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [Step(language, body) for language, body in found]


def essence(line: str) -> str:
    """A line without what differs from run to run."""
    line = _WORKER_ID.sub(r"\1-ID", line)
    return " ".join(_NUMBER.sub("#", _BARS.sub(" ", line)).split())


class Terminal:
    """A bash that is typed into."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._lines: list[str] = []
        self._num_commands = 0
        self._shell = subprocess.Popen(
            ["bash", "--norc"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def run(self, commands: str, timeout_s: float) -> int:
        """Type a block and wait for its last command; returns where in the output it began. Raises `AssertionError`."""
        start = len(self._lines)
        self._num_commands += 1
        mark = f"block {self._num_commands} ended with"
        assert self._shell.stdin
        self._shell.stdin.write(f"{commands}echo {mark} $?\n")
        self._shell.stdin.flush()
        ended = self._wait_for(lambda line: line.startswith(mark), start, timeout_s)
        assert ended == f"{mark} 0", f"after\n{commands}\nthe terminal shows\n{self._since(start)}"
        return start

    def see(self, line: str, start: int, timeout_s: float) -> None:
        """Wait until a line like `line` has come since `start`. Raises `AssertionError`."""
        wanted = essence(line)
        seen = self._wait_for(lambda shown: essence(shown) == wanted, start, timeout_s)
        assert seen is not None, f"the page shows\n{line}\nand the terminal\n{self._since(start)}"

    def close(self) -> None:
        """End it, and whatever the page left running."""
        assert self._shell.stdin
        assert self._shell.stdout
        self._shell.stdin.close()
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._shell.pid, number)
            except ProcessLookupError:
                break
            self._reader.join(15)
        self._shell.wait(15)
        self._reader.join(15)
        self._shell.stdout.close()

    def _read(self) -> None:
        assert self._shell.stdout
        for line in self._shell.stdout:
            self._lines.append(line.rstrip("\n"))

    def _wait_for(self, is_it: Callable[[str], bool], start: int, timeout_s: float) -> str | None:
        until_s = time.monotonic() + timeout_s
        while True:
            found = next((line for line in self._lines[start:] if is_it(line)), None)
            if found is not None or time.monotonic() > until_s or self._shell.poll() is not None:
                return found
            time.sleep(0.05)

    def _since(self, start: int) -> str:
        return "\n".join(self._lines[start:])


@contextmanager
def terminal(folder: Path, environment: Mapping[str, str]) -> Iterator[Terminal]:
    """A terminal in `folder`, for as long as the context lasts."""
    opened = Terminal(folder, environment)
    try:
        yield opened
    finally:
        opened.close()


def follow(page: str, folder: Path, environment: Mapping[str, str], *, timeout_s: float) -> None:
    """Do what the page says, in `folder`; each command and each sight within `timeout_s`. Raises `AssertionError`."""
    with terminal(folder, environment) as shell:
        start = 0
        for step in steps_of(page):
            if step.language == "python":
                name, _, _ = step.body.removeprefix("# ").partition("\n")
                assert re.fullmatch(r"\w+\.py", name), f"no file's name: {name}"
                (folder / name).write_text(step.body)
            elif step.language == "sh":
                start = shell.run(step.body, timeout_s)
            elif step.language == "text":
                for line in step.body.splitlines():
                    shell.see(line, start, min(60, timeout_s))
            else:
                raise AssertionError(f"nobody does a block of {step.language!r}")
