import subprocess
import sys
import types

import bus


def test_all_is_exactly_what_is_public() -> None:
    public = {
        name
        for name, value in vars(bus).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert public == set(bus.__all__)
    assert list(bus.__all__) == sorted(bus.__all__)


def test_importing_bus_needs_neither_nixl_nor_torch() -> None:
    program = "import sys, bus; print([name for name in ('nixl', 'torch') if name in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert finished.stdout.strip() == "[]"
