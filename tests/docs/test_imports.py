"""Pages and examples import from `bus` what `bus` has: a reader shall learn one place."""

import re
from pathlib import Path

import pytest

import bus

ROOT = Path(__file__).parents[2]
SHOWN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*.py"))]


@pytest.mark.parametrize("path", [pytest.param(path, id=path.name) for path in SHOWN])
def test_what_bus_has_is_imported_from_bus(path: Path) -> None:
    imported = re.findall(r"^from schemas\S* import (.+)$", path.read_text(), re.MULTILINE)
    names = {name.strip() for line in imported for name in line.split(",")}
    assert names & set(bus.__all__) == set()
