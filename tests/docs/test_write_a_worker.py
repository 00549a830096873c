"""The page for newcomers, followed to the letter: from the built wheel, in an empty folder and an empty environment."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.docs.walk_through import essence, follow

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "write-a-worker.md"


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """The project's wheel, built from a copy, since a build leaves files beside its source."""
    source = tmp_path / "source"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path / "wheel"), str(source)]
    subprocess.run(build, check=True, timeout=300)
    (built,) = (tmp_path / "wheel").glob("nixlbus-*.whl")
    return built


@pytest.mark.timeout(900)
def test_a_newcomer_comes_to_a_running_pipeline(
    tmp_path: Path, wheel: Path, unused_tcp_port_factory: Callable[[], int]
) -> None:
    """Only ports, the wheel and its pinned dependencies come from outside of the page."""
    folder = tmp_path / "empty"
    folder.mkdir()
    pins = f"{(ROOT / 'constraints.txt').read_text()}\nnixlbus=={wheel.name.split('-')[1]}\n"
    (tmp_path / "constraints.txt").write_text(pins)
    ours = ("NIXLBUS_", "OTEL_", "UCX_", "PYTHON", "VIRTUAL_ENV", "PYTEST", "PIP_CONSTRAINT")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "COLUMNS": "80",
        "PIP_CONSTRAINT": str(tmp_path / "constraints.txt"),
        "PIP_FIND_LINKS": f"{wheel.parent} {os.environ.get('PIP_FIND_LINKS', '')}",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "NIXLBUS_NATS_URL": f"nats://127.0.0.1:{unused_tcp_port_factory()}",
        "NIXLBUS_OTLP_PORT": str(unused_tcp_port_factory()),
    }
    try:
        follow(PAGE.read_text(), folder, environment, timeout_s=600)
        (installed,) = folder.glob(".venv/lib/python*/site-packages/workers/worker.py")
        assert installed.read_bytes() == (ROOT / "workers" / "worker.py").read_bytes()
    finally:
        shutil.rmtree(folder)  # a gigabyte, which pytest would keep


def test_what_may_differ_from_the_page_is_numbers_ids_and_bars() -> None:
    assert essence("ranker ready ranker-74f9e1") == essence("ranker ready ranker-000000")
    assert essence("└ nixl.write  embedder   ▐██▋   29.9 5 KiB") == essence("└ nixl.write embedder ██ 1.5 5 KiB")
    assert essence("0.63  a red car") != essence("0.63  a red cart")


@pytest.mark.parametrize(
    ("page", "why"),
    [
        ("```sh\nfalse\n```\n", "ended with 1"),
        ("```sh\necho one\n```\n\n```text\ntwo\n```\n", "the page shows\ntwo"),
        ("```python\nimport os\n```\n", "no file's name"),
        ("```ini\na = b\n```\n", "'ini'"),
    ],
)
def test_a_page_that_does_not_hold_is_noticed(tmp_path: Path, page: str, why: str) -> None:
    with pytest.raises(AssertionError) as caught:
        follow(page, tmp_path, os.environ, timeout_s=2)
    assert why in str(caught.value)
