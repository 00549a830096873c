import json
from typing import Any

import pytest

from tests.graph_fixture import SAMPLES, json_of, run_cli


@pytest.fixture(scope="module")
def demo() -> dict[str, Any]:
    image = str(SAMPLES / "digit-3.png")
    finished = run_cli("demo", "--image", image, "--prompt", "What digit is this?", "--json")
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("\n") == 1
    result: dict[str, Any] = json_of(finished)
    return result


def test_the_demo_prints_one_json_object_with_answer_ledger_and_spans(demo: dict[str, Any]) -> None:
    assert "3" in demo["text"]
    assert len(demo["trace_id"]) == 32
    assert all(set(hop) == {"name", "bytes", "ms"} for hop in demo["ledger"])
    needed = {"name", "kind", "span_id", "parent_id", "service", "start_ns", "end_ns", "attributes"}
    assert all(needed <= set(span) for span in demo["spans"])
    assert all(0 < span["start_ns"] <= span["end_ns"] for span in demo["spans"])


def test_the_demo_s_trace_has_one_root_no_orphan_and_all_five_services(demo: dict[str, Any]) -> None:
    ids = {span["span_id"] for span in demo["spans"]}
    roots = [span for span in demo["spans"] if not span["parent_id"]]
    assert [(root["service"], root["kind"]) for root in roots] == [("frontend", "server")]
    assert all(span["parent_id"] in ids for span in demo["spans"] if span["parent_id"])
    assert {span["service"] for span in demo["spans"]} == {"frontend", "processor", "decode", "prefill", "encode"}


def test_without_a_usable_transport_the_demo_fails_and_says_so() -> None:
    finished = run_cli("demo", "--json", UCX_TLS="nothing")
    assert finished.returncode == 1
    error = json.loads(finished.stdout)["error"]
    assert "no usable transport with UCX_TLS=nothing" in error["message"]


def test_a_missing_picture_is_told_before_anything_starts() -> None:
    finished = run_cli("demo", "--image", "no-such-picture.png", timeout_s=15)
    assert finished.returncode == 1
    assert "no-such-picture.png" in finished.stderr
    assert "nats-server" not in finished.stderr
