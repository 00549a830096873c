"""A trace drawn for the terminal: one row per span, bars on a common time scale.

In: the `SpanRecord`s of a trace. Out: a rich renderable.
Invariants: draws any list of spans at any width without raising; a control character in a name never reaches
the terminal; without colour it says the same.
Leaves out: where the spans come from (`trace_store`), writing to the console.

    trace 4bf92f3577b34da6a3ce929d0e0e4736 · 3 spans · 1 service · 40.0 ms

    span                     service 0                  40.0 ms   ms  bytes GB/s
    process graph.vlm.encode encode  ██████████████████████████ 40.0
    ├ model.encode           encode  ▐██████████▊               17.0
    └ nixl.write             encode               ███▎          5.00 16 MiB 3.36
"""

from collections.abc import Iterable, Sequence

import msgspec
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from observability.semantic_conventions import NIXL_BANDWIDTH_BYTES_PER_S, NIXL_BYTES
from observability.span_record import SpanRecord, tree

# The terminal's own colours, so that they suit light and dark; red is kept for errors.
_SERVICE_STYLES = ("cyan", "green", "magenta", "blue", "yellow", "bright_cyan", "bright_green", "bright_blue")
_ERROR_STYLE = "red"
_LEFT_EIGHTHS = " ▏▎▍▌▋▊▉█"
_FULL = "█"
_RIGHT_HALF = "▐"
_RIGHT_EIGHTH = "▕"

_MIN_NAME_CELLS = 16
_MAX_SERVICE_CELLS = 14
_MIN_BAR_CELLS = 14
_WIDE_CELLS = 100
_WIDE_GAP = "  "
_NARROW_GAP = " "
# Beyond what any machine moves; an attribute above it is a sender's mistake.
_MOST_BYTES = 1e18


def render_waterfall(spans: Sequence[SpanRecord], *, width: int | None = None) -> RenderableType:
    """Return a drawing of a trace, at most `width` cells wide and never wider than the console.

    Rows are in tree order. `⇠ name` behind a name is a link to that span; a failed span is red, with its
    message below it.
    """
    return _Waterfall(spans, width)


class _Waterfall:
    def __init__(self, spans: Sequence[SpanRecord], width: int | None) -> None:
        self._spans = list(spans)
        self._width = width

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._spans:
            yield Text("no spans", style="dim")
            return
        width = min(self._width or options.max_width, options.max_width)
        rows = _rows(self._spans)
        layout = _layout(rows, width)
        yield _title(self._spans)
        yield Text()
        yield _header(layout, _time_range(self._spans)[1])
        for row in rows:
            yield _line(row, layout)
            if row.error:
                yield from _error_lines(console, row, width)


class _Row(msgspec.Struct, frozen=True):
    """What one line says."""

    guide: str
    """The branches before the name."""
    name: str
    link: str
    service: str
    style: str
    begin: float
    """Fractions of the trace's time."""
    end: float
    duration: str
    num_bytes: str
    rate: str
    error: str
    is_message: bool
    """The span stands for work that another span does."""


class _Layout(msgspec.Struct, frozen=True):
    """The cells of each column; 0 for one that is left out."""

    gap: str
    name: int
    service: int
    bar: int
    duration: int
    num_bytes: int
    rate: int


def _rows(spans: list[SpanRecord]) -> list[_Row]:
    begin_ns, total_ns = _time_range(spans)
    names = {span.span_id: _clean(span.name) for span in spans}
    styles: dict[str, str] = {}
    in_tree_order = tree(spans)
    rows = []
    for guide, (_, span) in zip(_guides([depth for depth, _ in in_tree_order]), in_tree_order, strict=True):
        style = styles.setdefault(span.service, _SERVICE_STYLES[len(styles) % len(_SERVICE_STYLES)])
        num_bytes = _number(span.attributes.get(NIXL_BYTES))
        rows.append(
            _Row(
                guide=guide,
                name=names[span.span_id],
                link=_link(span, names),
                service=_clean(span.service),
                style=style,
                begin=(span.start_ns - begin_ns) / total_ns,
                end=(span.start_ns + span.duration_ns - begin_ns) / total_ns,
                duration=_milliseconds(span.duration_ns),
                num_bytes="" if num_bytes is None else _binary_bytes(num_bytes),
                rate="" if num_bytes is None else _gigabytes_per_s(span, num_bytes),
                error=_clean(span.status_message or "failed") if span.status == "error" else "",
                is_message=span.kind in ("producer", "client"),
            )
        )
    return rows


def _time_range(spans: Iterable[SpanRecord]) -> tuple[int, int]:
    """Return when the first span began and the ns until the last one ended, at least 1."""
    begin_ns = min(span.start_ns for span in spans)
    return begin_ns, max(1, *(span.start_ns + span.duration_ns - begin_ns for span in spans))


def _guides(depths: list[int]) -> list[str]:
    """Return the branches before each name: a rail for each ancestor that has a later sibling."""
    guides = []
    # Read from below, a row at depth d is followed by a sibling if d was seen since the last row above d.
    open_depths: set[int] = set()
    for depth in reversed(depths):
        rails = "".join("│ " if level in open_depths else "  " for level in range(1, depth))
        guides.append("" if depth == 0 else rails + ("├ " if depth in open_depths else "└ "))
        open_depths = {level for level in open_depths if level < depth} | {depth}
    return guides[::-1]


def _link(span: SpanRecord, names: dict[str, str]) -> str:
    if not span.links:
        return ""
    first = span.links[0].span_id
    more = f" +{len(span.links) - 1}" if len(span.links) > 1 else ""
    return f"⇠ {names.get(first, _clean(first[:8]))}{more}"


def _layout(rows: list[_Row], width: int) -> _Layout:
    """Give the fixed columns what they need, the names up to what they need, the bars the rest."""
    has_bytes = any(row.num_bytes for row in rows)
    gap = _WIDE_GAP if width >= _WIDE_CELLS else _NARROW_GAP
    service = min(_MAX_SERVICE_CELLS, _widest("service", (row.service for row in rows)))
    duration = _widest("ms", (row.duration for row in rows))
    num_bytes = _widest("bytes", (row.num_bytes for row in rows)) if has_bytes else 0
    rate = _widest("GB/s", (row.rate for row in rows)) if has_bytes else 0
    free = width - service - duration - num_bytes - rate - (5 if has_bytes else 3) * len(gap)
    wanted = _widest("span", (row.guide + " ".join(filter(None, (row.name, row.link))) for row in rows))
    name = max(_MIN_NAME_CELLS, min(wanted, free - max(_MIN_BAR_CELLS, free // 3)))
    return _Layout(gap, name, service, max(1, free - name), duration, num_bytes, rate)


def _widest(heading: str, texts: Iterable[str]) -> int:
    return max(cell_len(heading), *map(cell_len, texts))


def _title(spans: list[SpanRecord]) -> Text:
    num_services = len({span.service for span in spans})
    total = _milliseconds(_time_range(spans)[1])
    num_failed = sum(span.status == "error" for span in spans)
    return Text.assemble(
        ("trace ", "dim"),
        (_clean(spans[0].trace_id), "bold"),
        (f" · {_count(len(spans), 'span')} · {_count(num_services, 'service')} · {total} ms", "dim"),
        (f" · {num_failed} failed" if num_failed else "", _ERROR_STYLE),
        no_wrap=True,
        overflow="ellipsis",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _header(layout: _Layout, total_ns: int) -> Text:
    end = f"{_milliseconds(total_ns)} ms"
    scale = f"0{end:>{layout.bar - 1}}" if layout.bar > len(end) + 1 else ""
    cells = [
        Text(_fit(["span"], layout.name)),
        Text(_fit(["service"], layout.service)),
        Text(_fit([scale], layout.bar)),
        Text(_right("ms", layout.duration)),
        Text(_right("bytes", layout.num_bytes)),
        Text(_right("GB/s", layout.rate)),
    ]
    line = _join(cells, layout)
    line.stylize("dim")
    return line


def _line(row: _Row, layout: _Layout) -> Text:
    failed = _ERROR_STYLE if row.error else ""
    cells = [
        _name_cell(row, layout.name),
        Text(_fit([row.service], layout.service), style=row.style),
        _bar_cell(row, layout.bar),
        Text(_right(row.duration, layout.duration), style=failed),
        Text(_right(row.num_bytes, layout.num_bytes)),
        Text(_right(row.rate, layout.rate)),
    ]
    return _join(cells, layout)


def _join(cells: list[Text], layout: _Layout) -> Text:
    line = Text(layout.gap).join(cell for cell in cells if cell.plain)
    line.no_wrap, line.overflow = True, "crop"
    line.rstrip()
    return line


def _name_cell(row: _Row, width: int) -> Text:
    available = width - cell_len(row.guide)
    short = _shortened(row.name)
    texts = [row.name, short]
    if row.link:
        texts = [f"{row.name} {row.link}", f"{short} {row.link}", f"{row.name} ⇠", f"{short} ⇠"]
    cell = Text(_fit([row.guide + text for text in texts], width))
    cell.stylize("dim", 0, len(row.guide))
    if available > 0:
        cell.stylize(_ERROR_STYLE if row.error else "dim" if row.is_message else "", len(row.guide))
        if row.link and (at := cell.plain.rfind("⇠")) >= 0:
            cell.stylize("dim", at)
    return cell


def _shortened(name: str) -> str:
    """Return "send …prefill" for "send graph.vlm.prefill": the operation and the end of its destination."""
    operation, _, destination = name.partition(" ")
    *head, last = destination.split(".")
    return f"{operation} …{last}" if head else name


def _bar_cell(row: _Row, width: int) -> Text:
    num_before, blocks = bar_blocks(row.begin, row.end, width)
    style = _ERROR_STYLE if row.error else f"dim {row.style}" if row.is_message else row.style
    return Text.assemble(" " * num_before, (blocks, style), " " * (width - num_before - len(blocks)))


def bar_blocks(begin: float, end: float, width: int) -> tuple[int, str]:
    """Return how many cells are empty before a bar, and its block characters; never none.

    `begin` and `end` are fractions of `width`. The right edge is drawn to an eighth of a cell. Unicode has no
    such blocks for a left edge, only the right half and the right eighth.
    """
    first = min(int(begin * width * 8), width * 8 - 1)
    last = min(max(round(end * width * 8), first + 1), width * 8)
    num_before, left = divmod(first, 8)
    num_full, right = divmod(last, 8)
    if num_before == (last - 1) // 8:
        return num_before, _block_within_a_cell(left, last - first)
    edge = _FULL if left < 2 else _RIGHT_HALF if left < 6 else _RIGHT_EIGHTH
    return num_before, edge + _FULL * (num_full - num_before - 1) + (_LEFT_EIGHTHS[right] if right else "")


def _block_within_a_cell(left: int, num_eighths: int) -> str:
    if num_eighths < 3 and left >= 4:
        return _RIGHT_EIGHTH
    if left >= 3:
        return _RIGHT_HALF
    return _LEFT_EIGHTHS[num_eighths]


def _error_lines(console: Console, row: _Row, width: int) -> Iterable[Text]:
    rails = row.guide.replace("├", "│").replace("└", " ")
    if cell_len(rails) > width // 2:
        rails = ""
    for part in Text(f"✗ {row.error}", style=_ERROR_STYLE).wrap(console, max(1, width - cell_len(rails))):
        yield Text.assemble((rails, "dim"), part, no_wrap=True, overflow="crop")


def _fit(texts: list[str], width: int) -> str:
    """Return the first text that fits, padded, or the last one cut with an ellipsis."""
    fitting = next((text for text in texts if cell_len(text) <= width), None)
    if fitting is None:
        fitting = set_cell_size(texts[-1], max(0, width - 1)).rstrip() + "…"
    return fitting + " " * (width - cell_len(fitting))


def _right(text: str, width: int) -> str:
    return " " * (width - cell_len(text)) + text if width else ""


def _milliseconds(ns: int) -> str:
    """Return milliseconds with three digits or more."""
    ms = ns / 1e6
    return f"{ms:.2f}" if ms < 9.995 else f"{ms:.1f}" if ms < 99.95 else f"{ms:,.0f}"


def _binary_bytes(num_bytes: float) -> str:
    """Return "640 B", "64 KiB", "1.25 MiB": at most three digits."""
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    units = ["KiB", "MiB", "GiB", "TiB"]
    num_bytes /= 1024
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1024
        del units[0]
    return f"{num_bytes:.3g} {units[0]}"


def _gigabytes_per_s(span: SpanRecord, num_bytes: float) -> str:
    """Return what the span says of itself, or its bytes over its time."""
    stated = _number(span.attributes.get(NIXL_BANDWIDTH_BYTES_PER_S))
    bytes_per_s = num_bytes / (max(1, span.duration_ns) / 1e9) if stated is None else stated
    return f"{bytes_per_s / 1e9:.2f}"


def _number(value: object) -> float | None:
    """Return an attribute as a number of bytes, if it is one: it came from another process."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value < _MOST_BYTES else None


def _clean(text: str) -> str:
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
