import subprocess
import sys
import types

import pytest

import bus
from bus import public_names


def test_all_is_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(public_names).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(bus.__all__)
    assert list(bus.__all__) == sorted(bus.__all__)
    assert public <= set(dir(bus))
    assert all(getattr(bus, name) is getattr(public_names, name) for name in public)
    assert "nothing_of_the_kind" not in dir(bus)
    with pytest.raises(AttributeError, match="nothing_of_the_kind"):
        bus.nothing_of_the_kind  # noqa: B018


def test_importing_bus_needs_neither_nixl_nor_torch() -> None:
    program = "import sys, bus; bus.Bus; print([name for name in ('nixl', 'torch') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert finished.stdout.strip() == "[]"


def test_importing_bus_takes_in_nothing_before_a_name_is_asked_for() -> None:
    program = (
        "import sys, bus; print([name for name in ('asyncio', 'nats', 'msgspec') if name in sys.modules]);"
        "from bus import *; print(Bus.__name__, len(bus.__all__) == len({*bus.__all__} & {*globals()}))"
    )
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert finished.stdout.splitlines() == ["[]", "Bus True"]
