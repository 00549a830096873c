"""nixlbus's public API: open a `Bus`, call and serve typed messages, move tensors by paired operations.

The names stand in `bus.public_names`, which is imported when the first of them is asked for: nats alone takes a
quarter of the time, and the pytest plugin in here is loaded by every test run of whoever has nixlbus installed.
nixl and torch are imported when a bus opens its data plane, so that `import bus` works where they aren't installed.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bus.public_names import *  # noqa: F403
    from bus.public_names import __all__ as __all__


def __getattr__(name: str) -> object:
    if name.startswith("__") and name != "__all__":  # what the import system itself asks a module for
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    offered = import_module("bus.public_names")
    if name != "__all__" and name not in offered.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals().update({public: getattr(offered, public) for public in offered.__all__}, __all__=offered.__all__)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("bus.public_names").__all__})
