"""The shape that every benchmark's JSON has: machine, versions, rows, checks."""

import datetime
import json
import os
import platform
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("nixl", "nats-py", "torch", "msgspec", "uvloop")


class Report:
    """Rows and checks of one run."""

    def __init__(self, benchmark: str, packages: Sequence[str] = PACKAGES) -> None:
        self.benchmark = benchmark
        self.rows: list[dict[str, Any]] = []
        self.checks: list[dict[str, Any]] = []
        self.versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}

    def row(
        self,
        case: str,
        system: str,
        size_bytes: int,
        concurrency: int,
        seconds: Sequence[float],
        wall_s: float,
        **more: float,
    ) -> None:
        """Enter the durations of single operations, and of all of them together; and further columns."""
        ordered = sorted(seconds)
        self.rows.append(
            {
                "case": case,
                "size_bytes": size_bytes,
                "concurrency": concurrency,
                "system": system,
                "p50_us": round(statistics.median(ordered) * 1e6, 1),
                "p99_us": round(ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))] * 1e6, 1),
                "per_s": round(len(ordered) / wall_s, 1),
                "bytes_per_s": round(size_bytes * len(ordered) / wall_s),
                **more,
            }
        )

    def has(self, case: str, system: str, size_bytes: int, concurrency: int) -> bool:
        """Whether such a row was entered."""
        key = (case, system, size_bytes, concurrency)
        return any((row["case"], row["system"], row["size_bytes"], row["concurrency"]) == key for row in self.rows)

    def value(self, case: str, system: str, size_bytes: int, concurrency: int, column: str) -> float:
        """A figure of a row that was entered."""
        for row in self.rows:
            if (row["case"], row["system"], row["size_bytes"], row["concurrency"]) == (
                case,
                system,
                size_bytes,
                concurrency,
            ):
                return float(row[column])
        raise KeyError((case, system, size_bytes, concurrency))

    def check(
        self, name: str, value: float, limit: float, better: str = "lower", *, spread: tuple[float, float] | None = None
    ) -> None:
        """Hold a value against its limit; `better` is "lower" or "higher", `spread` the quartiles of a median."""
        met = value <= limit if better == "lower" else value >= limit
        check = {"name": name, "value": round(value, 3), "limit": limit, "better": better, "ok": met}
        self.checks.append(check | ({"spread": [round(each, 3) for each in spread]} if spread else {}))

    def write(self, path: Path) -> None:
        """Write the JSON."""
        machine = {"cores": os.cpu_count(), "machine": platform.machine(), "system": platform.platform()}
        whole = {
            "benchmark": self.benchmark,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "machine": machine,
            "versions": self.versions,
            "rows": self.rows,
            "checks": self.checks,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(whole, indent=1) + "\n")
