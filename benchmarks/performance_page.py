"""The tables and the plot of docs/performance.md, from the JSON of a run.

    python -m benchmarks.performance_page results/operations.json

Everything between the page's two marks is written anew; what stands around them is by hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
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
        "| check | value | limit | |",
        "|---|---|---|---|",
    ]
    for check in run["checks"]:
        sign = "≤" if check["better"] == "lower" else "≥"
        met = "met" if check["ok"] else "**missed**"
        lines.append(f"| {check['name']} | {check['value']:.3g} | {sign} {check['limit']} | {met} |")
    lines += [
        "",
        "| case | bytes | at once | system | p50 µs | p99 µs | per s | GB/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        gigabytes = "" if row["case"] == "request" else f"{row['bytes_per_s'] / 1e9:.2f}"
        lines.append(
            f"| {row['case']} | {row['size_bytes']:,} | {row['concurrency']} | {row['system']} | {row['p50_us']:,.0f} "
            f"| {row['p99_us']:,.0f} | {row['per_s']:,.0f} | {gigabytes} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Write the plot and the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    run = json.loads(parser.parse_args().json.read_text())
    plot(run["rows"], DOCS / "performance.svg")
    page = DOCS / "performance.md"
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n\n{tables(run)}\n\n{END}{after}")


if __name__ == "__main__":
    main()
