"""The page on testing: its files run as they stand, in a folder of their own, with the settings that it tells."""

import re
import subprocess
import sys
from pathlib import Path

from bus.testing import FaultProxy
from observability import SpanRecorder
from tests.docs.code_spans import code_spans

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "testing.md").read_text()


def test_the_files_of_the_page_run_as_they_stand(tmp_path: Path) -> None:
    files = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(files) == PAGE.count("```python") >= 6
    for name, source in files:
        (tmp_path / name).write_text(source)
    (settings,) = re.findall(r"^```ini\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "pytest.ini").write_text(settings)
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "bus.testing.plugin", "-W", "error", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout
    assert f"{PAGE.count('def test_')} passed" in finished.stdout


def test_the_tables_name_all_that_there_is() -> None:
    for title, cls in (("nixlbus_spans", SpanRecorder), ("nixlbus_faults", FaultProxy)):
        (table,) = re.findall(rf"^\| `{title}\.` \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
        told = {name for row in table.splitlines() for name in re.findall(r"`(?:await )?(\w+)", row.split(" | ")[0])}
        assert told == {name for name in vars(cls) if not name.startswith("_")}


def test_every_fixture_is_told_of() -> None:
    plugin = (ROOT / "bus" / "testing" / "plugin.py").read_text()
    fixtures = set(re.findall(r"^def (nixlbus_\w+)|name=\"(nixlbus_\w+)\"", plugin, re.MULTILINE))
    rows = re.findall(r"^\| `(nixlbus_\w+)` \|", PAGE, re.MULTILINE)
    assert sorted(rows) == sorted({plain or named for plain, named in fixtures})
    assert {span for span in code_spans(PAGE) if re.fullmatch(r"nixlbus_\w+", span)} <= set(rows)
