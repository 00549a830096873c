"""decode: a prompt in, its answer out token by token.

In: `DecodeRequest` with expanded token ids. Out: `DecodeToken` frames and a `DecodeDone`. It reserves KV blocks for
the prompt, offers them to a prefill worker, waits until their bytes are proved complete, and continues from there.
"""

import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, ClassVar

from bus import BlockLayout, BlockPool, CallMeter, RequestRefused, RetryPolicy
from observability import semantic_conventions as names
from observability.tracing import span
from schemas.fault import FaultCode
from schemas.stages import DecodeDone, DecodeRequest, DecodeToken, PrefillReply, PrefillRequest
from workers.declaration import endpoint
from workers.ledger import Ledger
from workers.models.transformers_adapter import TransformersLanguageModel
from workers.models.vision_language_model import LanguageModel, ModelIdentity
from workers.paired_call import reply_and_completion
from workers.roles.model_worker import ModelWorker


class DecodeWorker(ModelWorker):
    """Runs the language model token by token from transferred keys and values."""

    role: ClassVar[str] = "decode"
    model: LanguageModel
    pool: BlockPool

    def load(self, model: Path) -> ModelIdentity:
        """Load the language model."""
        self.model = TransformersLanguageModel.load(model)
        self.model.step(self.model.restore(self.model.prefill([0, 0], None).keys_values), 0, 2)  # warms it up
        return self.model.identity

    async def start(self) -> None:
        """Load, and register the pool of KV blocks."""
        await super().start()
        shape = self.model.kv_shape
        layout = BlockLayout(
            num_layers=shape.num_layers,
            num_blocks=self.settings.kv_blocks,
            block_tokens=self.settings.block_tokens,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            dtype=shape.dtype,
        )
        self.pool = BlockPool(self.bus.memory, layout)

    @endpoint("decode", concurrency=64)
    async def decode(self, request: DecodeRequest) -> AsyncGenerator[DecodeToken | DecodeDone, None]:
        """Stream the answer: at most `max_tokens` tokens, the last a stop token if one came."""
        ledger = Ledger("decode")
        self.check_model(request)
        if len(request.input_ids) + request.max_tokens > self.model.context_tokens:
            raise RequestRefused(
                FaultCode.PROMPT_TOO_LONG,
                f"{len(request.input_ids)} prompt tokens and {request.max_tokens} of answer are over the context "
                f"of {self.model.context_tokens} tokens",
                remedy="ask for fewer tokens or shorten the prompt",
            )
        cache, token_id = await self._prefilled(request, ledger)
        with span("model.decode") as decoding:
            position, num_tokens = len(request.input_ids), 0
            started_s = time.perf_counter()
            while True:
                yield DecodeToken(token_id=token_id)
                num_tokens += 1
                stopped = token_id in request.stop_token_ids
                if stopped or num_tokens == request.max_tokens:
                    break
                token_id = await self.thread.run(self._next_token, cache, token_id, position)
                position += 1
            finish_reason = "stop" if stopped else "length"
            decoding.set(
                {
                    names.GEN_AI_USAGE_OUTPUT_TOKENS: num_tokens,
                    names.GEN_AI_RESPONSE_FINISH_REASONS: [finish_reason],
                    "model.ms_per_token": round((time.perf_counter() - started_s) * 1e3 / num_tokens, 3),
                }
            )
        hops, elapsed_ms = ledger.close()
        yield DecodeDone(finish_reason="stop" if stopped else "length", hops=hops, elapsed_ms=elapsed_ms)

    async def _prefilled(self, request: DecodeRequest, ledger: Ledger) -> tuple[Any, int]:
        """The model's cache after the prompt, made of bytes that were proved complete, and the first token."""
        with self.refusing():
            blocks = self.pool.allocate(len(request.input_ids))
        try:
            async with await self.bus.create_writable(blocks.descriptor, name="kv") as kv:
                meter = CallMeter()
                call = self.bus.request(
                    self.bus.subjects.graph(self.settings.graph, "prefill"),
                    PrefillRequest(
                        request_id=request.request_id,
                        model=request.model,
                        revision=request.revision,
                        input_ids=request.input_ids,
                        num_image_tokens=request.num_image_tokens,
                        images=request.images,
                        kv=kv.metadata,
                    ),
                    PrefillReply,
                    timeout_s=self.settings.request_timeout_s,
                    retry=RetryPolicy(),
                    meter=meter,
                )
                reply = await reply_and_completion(call, kv)
            ledger.call("prefill", meter, reply.hops, reply.elapsed_ms)
            return await self.thread.run(lambda: self.model.restore(blocks.gather())), reply.token_id
        finally:
            blocks.free()

    def _next_token(self, cache: Any, token_id: int, position: int) -> int:
        return int(self.model.step(cache, token_id, position).argmax())
