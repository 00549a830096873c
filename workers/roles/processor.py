"""processor: the graph's front on the bus; a chat in, text out.

In: `GenerateRequest` from anybody, msgpack or JSON. Out: `GenerateChunk` frames as text becomes certain, then a
`GenerateDone` with the ledger and the trace id. It tokenizes, expands image placeholders so that everyone behind it
can reserve memory beforehand, and follows the decode worker's stream.
"""

import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, ClassVar

from bus import CallMeter, RequestRefused, RetryPolicy
from observability import semantic_conventions as names
from observability.tracing import current_span
from schemas.fault import FaultCode
from schemas.generate import MAX_IMAGES, ChatMessage, GenerateChunk, GenerateDone, GenerateRequest, ImagePart, Usage
from schemas.stages import DecodeDone, DecodeRequest, DecodeToken
from workers.declaration import endpoint
from workers.ledger import Ledger
from workers.models.images import image_size
from workers.models.transformers_adapter import TransformersPromptTokenizer
from workers.models.vision_language_model import ModelIdentity, PromptTokenizer, TokenizedPrompt
from workers.roles.model_worker import ModelWorker


class ProcessorWorker(ModelWorker):
    """Runs the tokenizer."""

    role: ClassVar[str] = "processor"
    needs_data_plane: ClassVar[bool] = False
    tokenizer: PromptTokenizer

    def load(self, model: Path) -> ModelIdentity:
        """Load the tokenizer."""
        self.tokenizer = TransformersPromptTokenizer.load(model)
        self.tokenizer.tokenize([{"role": "user", "content": [{"type": "image"}]}], [(32, 32)])  # warms its caches
        return self.tokenizer.identity

    @endpoint("generate", concurrency=64, public=True)
    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk | GenerateDone, None]:
        """Stream the answer to a chat."""
        ledger = Ledger("processor")
        request_id = request.request_id or secrets.token_hex(8)
        if request.model not in ("", self.identity.name):
            raise RequestRefused(
                FaultCode.UNKNOWN_MODEL,
                f"this graph serves {self.identity.name}, not {request.model[:80]!r}",
                remedy=f"ask for {self.identity.name}, or leave the model out",
            )
        images = images_of(request.messages)
        if len(images) > MAX_IMAGES:
            raise RequestRefused(
                FaultCode.INVALID_PROMPT, f"{len(images)} images in one request; {MAX_IMAGES} are served"
            )
        prompt = await self.thread.run(self._tokenize, request.messages, images)
        max_tokens = min(request.max_tokens, self.tokenizer.context_tokens - len(prompt.input_ids))
        _describe(request, self.identity.name, max_tokens, len(prompt.input_ids))
        decode_request = DecodeRequest(
            request_id=request_id,
            model=self.identity.name,
            revision=self.identity.revision,
            input_ids=prompt.input_ids,
            num_image_tokens=prompt.num_image_tokens,
            images=images,
            max_tokens=max_tokens,
            stop_token_ids=[] if request.ignore_eos else sorted(self.tokenizer.stop_token_ids),
        )
        meter = CallMeter()
        text = self.tokenizer.text_stream()
        frames = self.bus.stream(
            self.bus.subjects.graph(self.settings.graph, "decode"),
            decode_request,
            DecodeToken,
            DecodeDone,
            timeout_s=self.settings.request_timeout_s,
            retry=RetryPolicy(),
            meter=meter,
        )
        async with aclosing(frames):
            async for frame in frames:
                if isinstance(frame, DecodeToken):
                    yield GenerateChunk(text=text.push([frame.token_id]), token_ids=[frame.token_id])
                else:
                    done: DecodeDone = frame
        rest = text.finish()
        if rest:
            yield GenerateChunk(text=rest, token_ids=[])
        ledger.own()
        ledger.call("decode", meter, done.hops, done.elapsed_ms)
        current_span().set(
            {names.GEN_AI_RESPONSE_FINISH_REASONS: [done.finish_reason], names.GEN_AI_USAGE_OUTPUT_TOKENS: done.seq}
        )
        hops, elapsed_ms = ledger.close()
        yield GenerateDone(
            finish_reason=done.finish_reason,
            model=self.identity.name,
            usage=Usage(prompt_tokens=len(prompt.input_ids), completion_tokens=done.seq),
            ledger=hops,
            elapsed_ms=elapsed_ms,
            request_id=request_id,
            trace_id=current_span().trace_id,
        )

    def _tokenize(self, messages: list[ChatMessage], images: list[bytes]) -> TokenizedPrompt:
        return self.tokenizer.tokenize([_as_template(message) for message in messages], [image_size(i) for i in images])


def images_of(messages: list[ChatMessage]) -> list[bytes]:
    """The images of a chat, in the order in which the model sees them."""
    return [
        part.image
        for message in messages
        if not isinstance(message.content, str)
        for part in message.content
        if isinstance(part, ImagePart)
    ]


def _as_template(message: ChatMessage) -> dict[str, Any]:
    if isinstance(message.content, str):
        return {"role": message.role, "content": message.content}
    content = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    return {"role": message.role, "content": content}


def _describe(request: GenerateRequest, model: str, max_tokens: int, prompt_tokens: int) -> None:
    current_span().set(
        {
            names.GEN_AI_OPERATION_NAME: names.GEN_AI_OPERATION_NAME_CHAT,
            names.GEN_AI_PROVIDER_NAME: "nixlbus",
            names.GEN_AI_REQUEST_MODEL: request.model or model,
            names.GEN_AI_RESPONSE_MODEL: model,
            names.GEN_AI_REQUEST_MAX_TOKENS: max_tokens,
            names.GEN_AI_USAGE_INPUT_TOKENS: prompt_tokens,
        }
    )
