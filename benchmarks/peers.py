"""The same operations with what people use today: `dynamo.nixl_connect`, run in its own environment."""

import json
import subprocess
from pathlib import Path

from benchmarks.report import Report

PYTHON = Path(__file__).parent.parent / ".venv-dynamo" / "bin" / "python"
TIMEOUT_S = 300


def nixl_connect_rows(report: Report, quick: bool) -> None:
    """Measure it and enter its rows. Raises `FileNotFoundError` without its environment (make test makes it)."""
    if not PYTHON.exists():
        raise FileNotFoundError(f"{PYTHON}: make test sets it up")
    command = [str(PYTHON), str(Path(__file__).with_name("dynamo_peer.py")), *(["--quick"] if quick else [])]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    measured = json.loads(finished.stdout.splitlines()[-1])
    report.versions["ai-dynamo-runtime"] = measured["version"]
    for row in measured["rows"]:
        report.row(
            row["case"], "nixl_connect", row["size_bytes"], row["concurrency"], row["durations_s"], row["wall_s"]
        )
