"""The drawing of a trace: exact rows, colours only where there is a terminal, any input at any width."""

import io

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from observability import SpanLinkRecord, SpanRecord, render_waterfall
from observability.waterfall import bar_blocks

MS = 1_000_000
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
WRITE = {"nixl.bytes": 65536, "nixl.bandwidth_bytes_per_s": 3.21e9}


def span(
    number: int, parent: int, name: str, service: str, begin_ms: float, end_ms: float, **more: object
) -> SpanRecord:
    ids = {"trace_id": TRACE, "span_id": f"{number:016x}", "parent_id": f"{parent:016x}" if parent else ""}
    fields = {"kind": "internal", **ids, "start_ns": int(begin_ms * MS), "end_ns": int(end_ms * MS), **more}
    return SpanRecord(name=name, service=service, **fields)  # type: ignore[arg-type]


REQUEST = [
    span(1, 0, "process graph.vlm.prefill", "prefill", 100, 140, kind="consumer"),
    span(2, 1, "embeddings.writable", "prefill", 101, 120, links=(SpanLinkRecord(TRACE, f"{5:016x}"),)),
    span(3, 1, "send graph.vlm.encode", "prefill", 102, 120.5, kind="producer"),
    span(4, 3, "process graph.vlm.encode", "encode", 103, 120, kind="consumer"),
    span(5, 4, "nixl.write", "encode", 118, 119.05, attributes=WRITE),
    span(6, 1, "nixl.write", "prefill", 130, 135, status="error", status_message="peer decode-1 is gone"),
]


def drawn(spans: list[SpanRecord], width: int, *, console_width: int | None = None, terminal: bool = False) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=console_width or width, force_terminal=terminal, color_system="standard" if terminal else None
    )
    console.print(render_waterfall(spans, width=width))
    return file.getvalue()


EXPECTED = [
    "trace 4bf92f3577b34da6a3ce929d0e0e4736 · 6 spans · 2 services · 40.0 ms · 1 failed",
    "",
    "span                                service  0                           40.0 ms    ms   bytes  GB/s",
    "process graph.vlm.prefill           prefill  ███████████████████████████████████  40.0",
    "├ embeddings.writable ⇠ nixl.write  prefill  ▕████████████████▌                   19.0",
    "├ send graph.vlm.encode             prefill   ▕████████████████                   18.5",
    "│ └ process graph.vlm.encode        encode     ▐██████████████▌                   17.0",
    "│   └ nixl.write                    encode                  ▕▋                    1.05  64 KiB  3.21",
    "└ nixl.write                        prefill                            ▐███▋      5.00",
    "  ✗ peer decode-1 is gone",
]


def test_a_request_at_width_100() -> None:
    assert drawn(REQUEST, 100).splitlines() == EXPECTED


def test_a_pipe_gets_no_escape_and_a_terminal_gets_red_for_the_failed_span_alone() -> None:
    assert "\x1b" not in drawn(REQUEST, 100)
    coloured = drawn(REQUEST, 100, terminal=True).splitlines()
    assert ["\x1b[31m" in line for line in coloured] == [True] + [False] * 7 + [True, True]


def test_a_narrow_console_shortens_names_and_keeps_every_column() -> None:
    for width in (60, 80, 120):
        lines = drawn(REQUEST, width).splitlines()
        assert all(cell_len(line) <= width for line in lines)
        assert len(lines) == len(drawn(REQUEST, 100).splitlines())
        assert "64 KiB" in lines[7]
        assert "3.21" in lines[7]
    assert "process …encode" in drawn(REQUEST, 66)


def test_a_drawing_is_never_wider_than_its_console() -> None:
    assert drawn(REQUEST, 200, console_width=80) == drawn(REQUEST, 80)


def test_bandwidth_is_worked_out_where_the_span_does_not_state_it() -> None:
    [line] = [
        line
        for line in drawn([span(1, 0, "w", "s", 0, 2, attributes={"nixl.bytes": 8_000_000})], 100).splitlines()
        if "MiB" in line
    ]
    assert line.endswith("2.00  7.63 MiB  4.00")


def test_no_spans_is_said() -> None:
    assert drawn([], 80) == "no spans\n"


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    evil = span(1, 0, "a\x1b[2Jb\nc", "s\r", 0, 1, status="error", status_message="x\x1b]0;title\x07")
    text = drawn([evil], 80)
    assert not set(text) & set("\x1b\r\x07")
    assert len(text.splitlines()) == 5


def test_bars_begin_and_end_where_the_span_does() -> None:
    assert bar_blocks(0, 1, 10) == (0, "█" * 10)
    assert bar_blocks(0, 0.5, 10) == (0, "█" * 5)
    assert bar_blocks(0.5, 1, 10) == (5, "█" * 5)
    assert bar_blocks(0, 0, 10) == (0, "▏")
    assert bar_blocks(1, 1, 10) == (9, "▕")
    assert bar_blocks(0.25, 0.4375, 10) == (2, "▐█▍")


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_a_bar_is_never_empty_and_stays_inside(one: float, other: float, width: int) -> None:
    num_before, blocks = bar_blocks(min(one, other), max(one, other), width)
    assert num_before >= 0
    assert 1 <= len(blocks) <= width - num_before
    assert " " not in blocks


IDS = st.sampled_from(["", "a", "b", "c", "d"])
ATTRIBUTES = st.dictionaries(
    st.sampled_from(["nixl.bytes", "nixl.bandwidth_bytes_per_s"]),
    st.one_of(st.integers(), st.floats(), st.text(), st.booleans(), st.none()),
)
SPANS = st.builds(
    SpanRecord,
    name=st.text(),
    kind=st.text(),
    trace_id=st.text(),
    span_id=IDS,
    parent_id=IDS,
    service=st.text(max_size=20),
    start_ns=st.integers(0, 2**64 - 1),
    end_ns=st.integers(0, 2**64 - 1),
    attributes=ATTRIBUTES,
    links=st.lists(st.builds(SpanLinkRecord, st.text(), st.text()), max_size=2).map(tuple),
    status=st.sampled_from(["unset", "ok", "error"]),
    status_message=st.text(),
)


# Hypothesis builds its table of characters at the first text: seconds, in a fresh checkout.
@settings(suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(SPANS, max_size=12), st.integers(1, 130))
def test_any_spans_can_be_drawn_at_any_width(spans: list[SpanRecord], width: int) -> None:
    for line in drawn(spans, width).split("\n"):
        assert cell_len(line) <= width
