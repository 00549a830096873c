"""The control plane's page: its files run as they stand on a real server, and its tables are held against the code."""

import importlib
import inspect
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest

from bus import Bus, BusConfig, EmbeddedServer, embedded_server
from bus.control_plane.inbox import PROBE_HEADER
from bus.control_plane.retry import NOT_TAKEN
from schemas import protocol
from schemas.fault import FaultCode
from tests.docs.code_spans import code_spans, table_rows
from workers import endpoint
from workers.declaration import EndpointOptions
from workers.settings import ProcessSettings, Settings

PAGE = (Path(__file__).parents[2] / "docs" / "control-plane.md").read_text()
FILES: dict[str, str] = dict(re.findall(r"^```python\n# (\w+)\.py\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
EXAMPLES = sorted(set(FILES) - {"calculator"})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name, source in FILES.items():
        (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in FILES:
        sys.modules.pop(name, None)


@pytest.fixture
async def server() -> AsyncIterator[EmbeddedServer]:
    async with embedded_server() as running:
        yield running


@pytest.mark.parametrize("name", EXAMPLES)
async def test_an_example_of_the_control_plane_runs_as_it_stands(
    name: str, folder: Path, server: EmbeddedServer
) -> None:
    def config(worker_id: str) -> BusConfig:
        return BusConfig(worker_id=worker_id, nats_url=server.url)

    example = importlib.import_module(name)
    assert Path(str(example.__file__)).parent == folder
    async with Bus.open(config("client"), data_plane=False) as bus:
        await example.main(bus, config)


def test_every_fence_is_an_example_that_runs() -> None:
    assert PAGE.count("```") == 2 * len(FILES)
    assert len(EXAMPLES) >= 14
    assert all(re.search(r"^async def main\(bus, config\):$", FILES[name], re.MULTILINE) for name in EXAMPLES)


def test_the_table_of_options_is_all_that_an_endpoint_takes() -> None:
    options = [row[0].strip("`| ") for row in table_rows(PAGE, "option")]
    assert sorted(options) == sorted(inspect.signature(endpoint).parameters)
    defaults = {row[0].strip("`| "): row[1] for row in table_rows(PAGE, "option")}
    assert (int(defaults["concurrency"]), int(defaults["max_queued"])) == (
        EndpointOptions().concurrency,
        EndpointOptions().max_queued,
    )


def test_the_table_of_headers_is_all_of_ours() -> None:
    ours = {value for name, value in vars(protocol).items() if name.endswith("_HEADER")}
    told = {name for row in table_rows(PAGE, "header") for name in re.findall(r"`([\w-]+)`", row[0])}
    assert told == ours | {PROBE_HEADER, "traceparent"}


def test_the_tables_of_variables_are_all_that_a_process_reads() -> None:
    shared = msgspec.structs.fields(ProcessSettings)
    graphs = [field for field in msgspec.structs.fields(Settings) if field.name not in {each.name for each in shared}]
    for title, fields in (("variable", shared), ("graph's variable", graphs)):
        told = {name.strip("| `"): default.strip("`") for name, default, _ in table_rows(PAGE, title)}
        told.pop("NIXLBUS_IDENTITY", None)
        assert list(told) == [f"NIXLBUS_{field.name.upper()}" for field in fields]
        assert all(told[f"NIXLBUS_{each.name.upper()}"] == str(each.default) for each in fields if each.default != "")


def test_every_variable_that_is_read_stands_in_a_table() -> None:
    root = Path(__file__).parents[2]
    sources = "".join(path.read_text() for top in ("bus", "workers") for path in (root / top).rglob("*.py"))
    read = set(re.findall(r"""environ(?:\.get\(|\[)"(NIXLBUS_\w+)""", sources))
    tables = table_rows(PAGE, "variable") + table_rows((root / "docs" / "api.md").read_text(), "variable")
    assert {"NIXLBUS_IDENTITY", "NIXLBUS_KEY_FILE"} <= read <= {row[0].strip("| `") for row in tables}


def test_what_is_sent_again_is_what_the_code_sends_again() -> None:
    repeated = set()
    for error, _, again in table_rows(PAGE, "the caller sees"):
        codes = [code for code in re.findall(r"`([a-z_]+)`", error) if code in set(FaultCode)]
        if again.strip(" |") == "yes":
            repeated |= set(codes)
    assert repeated == set(NOT_TAKEN)


def test_every_anchor_is_a_heading() -> None:
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= titles


def test_every_variable_on_the_page_is_read_somewhere() -> None:
    variables = {name for span in code_spans(PAGE) for name in re.findall(r"NIXLBUS_\w+", span)}
    root = Path(__file__).parents[2]
    sources = "".join(path.read_text() for path in (root / "workers" / "settings.py", root / "bus" / "config.py"))
    assert variables
    assert all(name in sources for name in variables)
