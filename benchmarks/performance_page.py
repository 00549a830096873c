"""The tables and the plot of docs/performance.md, from the JSON of runs.

    python -m benchmarks.performance_page results/operations.json results/bus.json

Everything between the two marks of a benchmark is written anew; what stands around them is by hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- {benchmark}: begin -->", "<!-- {benchmark}: end -->"
SYSTEMS = {
    "raw_nats": ("request", "raw NATS request-reply"),
    "raw_nixl": ("write", "raw NIXL"),
    "memcpy": ("write", "memcpy"),
    "nixlbus": ("write", "nixlbus write"),
    "nixlbus_open": ("write", "nixlbus write, open grant"),
    "nixl_connect": ("write", "dynamo.nixl_connect write"),
}
"""By system: the case that the plot shows, and its label."""


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Median latency by size, one operation at a time, on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "nixlbus"  # the same figures give the same file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.5))
    for system, (case, label) in SYSTEMS.items():
        points = [
            (row["size_bytes"], row["p50_us"])
            for row in rows
            if (row["system"], row["case"], row["concurrency"]) == (system, case, 1)
        ]
        if points:
            axes.loglog(*zip(*points, strict=True), marker="o", base=10, label=label)
    axes.set_xlabel("bytes")
    axes.set_ylabel("p50, µs")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def tables(run: dict[str, Any]) -> str:
    """Machine, checks and rows as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    machine = run["machine"]
    lines = [
        f"Measured {run['date'][:10]} on {machine['cores']} cores ({machine['machine']}); {versions}.",
        "",
        "| check | value | middle half of the rounds | limit | |",
        "|---|---|---|---|---|",
    ]
    for check in run["checks"]:
        sign = "≤" if check["better"] == "lower" else "≥"
        met = "met" if check["ok"] else "**missed**"
        spread = " to ".join(f"{value:.3g}" for value in check.get("spread", ()))
        lines.append(f"| {check['name']} | {check['value']:.3g} | {spread} | {sign} {check['limit']} | {met} |")
    heading, row_of = ROWS[run["benchmark"]]
    columns = heading.count("|") - 1
    lines += ["", heading, "|---" * columns + "|", *(row_of(row) for row in run["rows"])]
    return "\n".join(lines)


def _operation(row: dict[str, Any]) -> str:
    gigabytes = "" if row["case"] == "request" else f"{row['bytes_per_s'] / 1e9:.2f}"
    return (
        f"| {row['case']} | {row['size_bytes']:,} | {row['concurrency']} | {row['system']} | {row['p50_us']:,.0f} "
        f"| {row['p99_us']:,.0f} | {row['per_s']:,.0f} | {gigabytes} |"
    )


def _request(row: dict[str, Any]) -> str:
    return (
        f"| {row['case']} | {row['concurrency']} | {row['system']} | {row['p50_us']:,.0f} | {row['p99_us']:,.0f} "
        f"| {row['per_s']:,.0f} | {row['cpu_us_client']:,.0f} | {row['cpu_us_responder']:,.0f} |"
    )


ROWS = {
    "operations": ("| case | bytes | at once | system | p50 µs | p99 µs | per s | GB/s |", _operation),
    "bus": ("| case | at once | system | p50 µs | p99 µs | per s | client CPU µs | responder CPU µs |", _request),
}
"""By benchmark: the heading of its rows, and one of them."""


def main() -> None:
    """Write the plot and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    page = DOCS / "performance.md"
    for path in parser.parse_args().json:
        run = json.loads(path.read_text())
        if run["benchmark"] == "operations":
            plot(run["rows"], DOCS / "performance.svg")
        begin, end = (mark.format(benchmark=run["benchmark"]) for mark in (BEGIN, END))
        before, _, rest = page.read_text().partition(begin)
        _, _, after = rest.partition(end)
        page.write_text(f"{before}{begin}\n\n{tables(run)}\n\n{end}{after}")


if __name__ == "__main__":
    main()
