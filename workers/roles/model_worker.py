"""What the roles that run a piece of the model share: the thread it runs in, its identity, the check of a request's."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar

from bus import Bus, PoolExhausted, RequestRefused
from schemas.fault import FaultCode
from schemas.stages import StageRequest
from workers.model_thread import ModelThread
from workers.models.packaged import digits_path
from workers.models.vision_language_model import ModelIdentity
from workers.roles.graph_worker import GraphWorker
from workers.settings import Settings


class ModelWorker(GraphWorker, ABC):
    """A worker with a piece of the model. Subclasses load it in `load` and set `identity`."""

    role: ClassVar[str] = "model"

    def __init__(self, bus: Bus, settings: Settings) -> None:
        super().__init__(bus, settings)
        self.thread = ModelThread()
        self.identity = ModelIdentity("", "")

    async def start(self) -> None:
        """Load the piece, in the thread that will run it."""
        self.identity = await self.thread.run(
            self.load, Path(self.settings.model) if self.settings.model else digits_path()
        )

    async def stop(self) -> None:
        """Stop the thread."""
        self.thread.close()

    @abstractmethod
    def load(self, model: Path) -> ModelIdentity:
        """Load the piece from the checkpoint's folder and say whose it is."""

    def metadata(self) -> dict[str, str]:
        """Discovery also tells the model."""
        return {**super().metadata(), "model": self.identity.name, "revision": self.identity.revision}

    @staticmethod
    @contextmanager
    def refusing() -> Iterator[None]:
        """Around what a handler reserves before it does anything: where there is no room, another worker is asked."""
        try:
            yield
        except PoolExhausted as error:
            raise RequestRefused(FaultCode.POOL_EXHAUSTED, error.what, remedy=error.remedy) from None

    def check_model(self, request: StageRequest) -> None:
        """Refuse a request for other weights: its tokens would mean something else here."""
        if (request.model, request.revision) != (self.identity.name, self.identity.revision):
            raise RequestRefused(
                FaultCode.UNKNOWN_MODEL,
                f"the request is for model {request.model} {request.revision}, "
                f"this {self.role} worker runs {self.identity.name} {self.identity.revision}",
                remedy="start all workers of a graph with the same model",
            )
