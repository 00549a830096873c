import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph_fixture import SAMPLES, RunningGraph

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


def run(graph: RunningGraph, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), "--server", graph.nats_url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("name", ["ask_msgpack.py", "ask_json.py"])
def test_a_client_with_nothing_of_ours_gets_the_answer(graph: RunningGraph, name: str) -> None:
    finished = run(graph, name, "--image", str(SAMPLES / "digit-4.png"), "What digit is this?")
    assert finished.returncode == 0, finished.stderr
    assert "4" in finished.stdout
    source = (EXAMPLES / name).read_text()
    assert not any(f"import {package}" in source for package in ("bus", "schemas", "workers", "observability"))


@pytest.mark.parametrize("name", ["ask_msgpack.py", "ask_json.py"])
def test_a_client_with_nothing_of_ours_reads_a_fault(graph: RunningGraph, name: str) -> None:
    finished = run(graph, name, "--image", str(EXAMPLES / name), "What digit is this?")
    assert finished.returncode != 0
    assert "invalid_image" in finished.stderr


@pytest.mark.parametrize("name", ["ask_msgpack.py", "ask_json.py"])
def test_a_client_learns_that_nobody_listens(graph: RunningGraph, name: str) -> None:
    finished = run(graph, name, "--subject", "nixlbus.v1.graph.nowhere.generate", "hello")
    assert "nobody listens" in finished.stderr
