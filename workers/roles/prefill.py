"""prefill: a prompt in, its keys and values written into the decode worker's KV blocks.

In: `PrefillRequest` with expanded token ids, images and a grant of KV memory. Out: one NIXL write, then the reply
with the first token. For a prompt with images it offers memory of its own to an encode worker and waits for the
embeddings; the decode worker's grant is claimed meanwhile.
"""

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from bus import CallMeter, RetryPolicy
from observability.tracing import span
from schemas.stages import EncodeReply, EncodeRequest, PrefillReply, PrefillRequest
from workers.declaration import endpoint
from workers.ledger import Ledger
from workers.models.transformers_adapter import TransformersLanguageModel
from workers.models.vision_language_model import LanguageModel, ModelIdentity
from workers.paired_call import reply_and_completion
from workers.roles.model_worker import ModelWorker

if TYPE_CHECKING:
    import torch


class PrefillWorker(ModelWorker):
    """Runs the language model over whole prompts."""

    role: ClassVar[str] = "prefill"
    model: LanguageModel

    def load(self, model: Path) -> ModelIdentity:
        """Load the language model."""
        self.model = TransformersLanguageModel.load(model)
        self.model.prefill([0, 0], None)  # the first run is slow; no request should pay for it
        return self.model.identity

    @endpoint("prefill", concurrency=8)
    async def prefill(self, request: PrefillRequest) -> PrefillReply:
        """Run the prompt and write [layers, 2, tokens, kv_heads, head_dim] to the grant."""
        ledger = Ledger("prefill")
        self.check_model(request)
        kv = self.model.kv_shape
        shape = (kv.num_layers, 2, len(request.input_ids), kv.num_kv_heads, kv.head_dim)
        with self.refusing():
            memory = self.bus.arena.allocate(shape, kv.dtype)
        with memory as source:
            async with self.bus.claim_ahead(request.kv) as pending:
                async with self._embeddings(request, ledger) as embeddings:
                    with span("model.prefill", attributes={"model.prompt_tokens": len(request.input_ids)}):
                        token_id = await self.thread.run(self._run, request.input_ids, embeddings, source.tensor)
                ledger.own()
                started_s = time.perf_counter()
                report = await (await self.bus.begin_write(await pending.granted(), source.descriptor))
                ledger.transfer("kv prefill->decode", report, (time.perf_counter() - started_s) * 1e3)
        hops, elapsed_ms = ledger.close()
        return PrefillReply(token_id=token_id, hops=hops, elapsed_ms=elapsed_ms)

    def _run(self, input_ids: list[int], embeddings: "torch.Tensor | None", keys_values: "torch.Tensor") -> int:
        """Fill `keys_values`, [layers, 2, tokens, kv_heads, head_dim], and return the first token."""
        prefilled = self.model.prefill(input_ids, embeddings)
        keys_values.copy_(prefilled.keys_values)
        return int(prefilled.logits.argmax())

    @asynccontextmanager
    async def _embeddings(self, request: PrefillRequest, ledger: Ledger) -> "AsyncIterator[torch.Tensor | None]":
        """The images' embeddings, [image tokens, hidden], in registered memory; None for a prompt without images."""
        if not request.images:
            yield None
            return
        shape = (sum(request.num_image_tokens), self.model.hidden_size)
        with self.bus.arena.allocate(shape, self.model.dtype) as target:
            async with await self.bus.create_writable(target.descriptor, name="embeddings") as embeddings:
                meter = CallMeter()
                call = self.bus.request(
                    self.bus.subjects.graph(self.settings.graph, "encode"),
                    EncodeRequest(
                        request_id=request.request_id,
                        model=request.model,
                        revision=request.revision,
                        images=request.images,
                        embeddings=embeddings.metadata,
                    ),
                    EncodeReply,
                    timeout_s=self.settings.request_timeout_s,
                    retry=RetryPolicy(),
                    meter=meter,
                )
                reply = await reply_and_completion(call, embeddings)
            ledger.call("encode", meter, reply.hops, reply.elapsed_ms)
            yield target.tensor
