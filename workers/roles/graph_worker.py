"""What the packaged roles share: settings, of which the graph's name is their group."""

from typing import ClassVar

from bus import Bus
from workers.settings import Settings
from workers.worker import Worker


class GraphWorker(Worker):
    """A role of a graph."""

    needs_data_plane: ClassVar[bool] = True

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus)
        self.settings = settings
        self.group = settings.graph
        self.timeout_s = settings.request_timeout_s
