"""Workers: classes with typed endpoints on the bus, the roles of the packaged graph, and the commands that run them.

The names that a worker of one's own is written with are here; importing them needs neither torch nor nixl.
"""

from workers.declaration import endpoint, job, on_event
from workers.worker import Worker

__all__ = ["Worker", "endpoint", "job", "on_event"]
