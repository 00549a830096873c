"""encode: images in, embeddings written into the prefill worker's memory.

In: `EncodeRequest` with image files and a grant. Out: the embeddings, by one NIXL write; then the reply.
"""

import time
from pathlib import Path
from typing import ClassVar

import torch

from bus import IncompatiblePeer
from observability.tracing import span
from schemas.stages import EncodeReply, EncodeRequest
from workers.declaration import endpoint
from workers.ledger import Ledger
from workers.models.images import blank_image
from workers.models.transformers_adapter import TransformersVisionEncoder
from workers.models.vision_language_model import ModelIdentity, VisionEncoder
from workers.roles.model_worker import ModelWorker


class EncodeWorker(ModelWorker):
    """Runs the vision tower and its projector."""

    role: ClassVar[str] = "encode"
    encoder: VisionEncoder

    def load(self, model: Path) -> ModelIdentity:
        """Load the encoder."""
        self.encoder = TransformersVisionEncoder.load(model)
        self.encoder.encode([blank_image()])  # the first run costs 100 ms that no request should pay
        return self.encoder.identity

    @endpoint("encode", concurrency=8)
    async def encode(self, request: EncodeRequest) -> EncodeReply:
        """Encode the images and write [sum of image tokens, hidden] to the grant."""
        ledger = Ledger("encode")
        self.check_model(request)
        with self.refusing():
            memory = self.bus.arena.allocate([request.embeddings.num_bytes], torch.uint8)
        with memory as source:
            async with self.bus.claim_ahead(request.embeddings) as pending:
                with span("model.encode", attributes={"model.images": len(request.images)}):
                    await self.thread.run(self._run, request.images, source.tensor)
                ledger.own()
                started_s = time.perf_counter()
                report = await (await self.bus.begin_write(await pending.granted(), source.descriptor))
                ledger.transfer("embeddings encode->prefill", report, (time.perf_counter() - started_s) * 1e3)
        hops, elapsed_ms = ledger.close()
        return EncodeReply(hops=hops, elapsed_ms=elapsed_ms)

    def _run(self, images: list[bytes], target: torch.Tensor) -> None:
        """Fill `target`, the bytes of the embeddings. Raises `IncompatiblePeer` if they are not as many."""
        embeddings = self.encoder.encode(images)
        if embeddings.nbytes != target.nbytes:
            raise IncompatiblePeer(
                f"the images make {embeddings.nbytes:,} bytes of embeddings, the prompt has room for {target.nbytes:,}",
                remedy="start all workers of a graph with the same model",
            )
        target.copy_(embeddings.view(torch.uint8).flatten())
