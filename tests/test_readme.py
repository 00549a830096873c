import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_readme_s_example_runs_as_it_stands() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    finished = subprocess.run(
        [sys.executable, "-W", "error", "-c", block], capture_output=True, text=True, timeout=60, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == "262144 bytes written, all 7.0\n"


def test_every_file_that_a_document_points_to_exists() -> None:
    documents = [path for path in ROOT.rglob("*.md") if not {".venv", "node_modules"} & set(path.parts)]
    assert len(documents) > 5
    for document in documents:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} points to {target}"
