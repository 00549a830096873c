"""The examples of workers, as a reader runs them; and what each of them is said to show."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.graph_fixture import environment

EXAMPLES = Path(__file__).parents[2] / "examples"

PRINTED = {
    "plain_service.py": "128 x 72\ninvalid_image: this is no picture; send PNG, JPEG or WebP\n",
    "tensor_pipeline.py": "".join(f"frame {n}: 307200 bytes, a spot at ({10 * n}, {20 * n})\n" for n in range(3)),
    "durable_job.py": (
        "submitted twice, stored once: True\n"
        "film-f: first.mov, delivery 1\nfilm-s: second.mov, delivery 2\nfilm-a: dead, unsupported\n"
    ),
    "token_stream.py": (
        "Once upon a time there was (6 tokens) \nthe reader left after 3 frames, and the storyteller stopped\n"
    ),
}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_should(name: str) -> None:
    command = [sys.executable, "-W", "error", str(EXAMPLES / name)]
    finished = subprocess.run(
        command,
        env=environment(PYTHONPATH=str(EXAMPLES.parent)),
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == PRINTED[name]


def test_a_useful_worker_takes_thirty_lines() -> None:
    """Messages, worker and its work; what starts a server and asks it is not counted."""
    source = (EXAMPLES / "plain_service.py").read_text()
    parts = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef | ast.FunctionDef)]
    lines = [line for part in parts for line in (ast.get_source_segment(source, part) or "").splitlines()]
    assert 20 < len([line for line in lines if line.strip()]) <= 30
