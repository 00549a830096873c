"""For tests of services on the bus: a real nats-server, and a proxy before it that does what networks do.

The pytest fixtures are in `plugin`, the only module that imports pytest; the rest works with any runner. Nothing of the
bus knows of this package: faults happen between real connections, so that whatever speaks NATS can be put behind them.
Every test run loads the plugin, and so this module: the names here are imported when they are asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bus.testing.fault_proxy import FaultProxy, ProxyError
    from bus.testing.fault_rules import FaultRule
    from bus.testing.own_thread import in_own_thread

__all__ = ["FaultProxy", "FaultRule", "ProxyError", "in_own_thread"]

_LAZY = {
    "FaultProxy": "bus.testing.fault_proxy",
    "FaultRule": "bus.testing.fault_rules",
    "ProxyError": "bus.testing.fault_proxy",
    "in_own_thread": "bus.testing.own_thread",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
