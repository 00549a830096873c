"""The ledger of a request as a table for people."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table


def ledger_table(ledger: Sequence[dict[str, Any]], elapsed_ms: float) -> Table:
    """One row per hop: bytes where it carried any, and milliseconds."""
    table = Table(title=f"ledger of {elapsed_ms:.1f} ms", title_justify="left", box=None, pad_edge=False)
    table.add_column("hop")
    table.add_column("bytes", justify="right")
    table.add_column("ms", justify="right")
    for hop in ledger:
        table.add_row(hop["name"], f"{hop['bytes']:,}" if hop["bytes"] else "", f"{hop['ms']:.2f}")
    return table
