"""For tests of services on the bus: a real nats-server, and a proxy before it that does what networks do.

The pytest fixtures are in `plugin`, the only module that imports pytest; the rest works with any runner. Nothing of the
bus knows of this package: faults happen between real connections, so that whatever speaks NATS can be put behind them.
"""

from bus.testing.fault_proxy import FaultProxy, ProxyError
from bus.testing.fault_rules import FaultRule
from bus.testing.own_thread import in_own_thread

__all__ = ["FaultProxy", "FaultRule", "ProxyError", "in_own_thread"]
