"""One example of every message, and a strategy for any value of it: what the codec's tests have in common."""

import inspect
from typing import Any

import msgspec
from hypothesis import strategies as st

from schemas import fault, generate, handshake, jobs, operations, performance, stages, stream, traces
from schemas.message import Message

MODULES = (fault, generate, handshake, jobs, operations, performance, stages, stream, traces)

ID = "0123456789abcdef"
GRANT = operations.RdmaMetadata(
    operation_id=ID,
    kind=operations.OperationKind.WRITABLE,
    worker_id="decode-1",
    epoch="e1",
    memory=[
        operations.MemoryExtent(
            region=1,
            generation=3,
            runs=[
                operations.Run(offset_bytes=128, length_bytes=2048),
                operations.Run(offset_bytes=4096, length_bytes=64),
            ],
            count=6,
            stride_bytes=65536,
        )
    ],
    lease_ms=60_000,
)
INITIATOR = operations.Initiator(worker_id="prefill-1", epoch="e2")
TOKEN = bytes(range(16))
PROCESS = operations.ProcessIdentity(boot_id="b1", pid_namespace="pid:[1]", pid=42, start_ticks=7)
FAULT = fault.Fault(
    code="invalid_image",
    message="the image can't be read",
    remedy="send a PNG",
    worker_id="encode-1",
    hops=["prefill-1", "decode-1"],
    trace_id="0" * 32,
    seq=2,
)
HOPS = [generate.Hop(name="encode", bytes=0, ms=2.5), generate.Hop(name="kv prefill->decode", bytes=19200, ms=0.6)]
STAGE = {"request_id": "r1", "model": "digits", "revision": "abc"}

EXAMPLES: dict[str, Message] = {
    "job.claim": jobs.JobClaim(
        state="working",
        job_id="order-7",
        worker_id="media-1",
        epoch="e1",
        delivery=2,
        stream_sequence=41,
        attempt=2,
        progress=b"page 3",
        traceparent=f"00-{'1' * 32}-{'2' * 16}-01",
    ),
    "fault": FAULT,
    "generate.request": generate.GenerateRequest(
        messages=[
            generate.ChatMessage(role="system", content="be brief"),
            generate.ChatMessage(
                role="user",
                content=[generate.ImagePart(image=b"\x89PNG"), generate.TextPart(text="What digit is this?")],
            ),
        ],
        model="digits",
        max_tokens=16,
        request_id="r1",
    ),
    "generate.chunk": generate.GenerateChunk(seq=0, text="This", token_ids=[17]),
    "stream.end": stream.StreamEnd(seq=3),
    "generate.done": generate.GenerateDone(
        seq=7,
        finish_reason="stop",
        model="digits",
        usage=generate.Usage(prompt_tokens=25, completion_tokens=7),
        ledger=HOPS,
        elapsed_ms=3.1,
        request_id="r1",
        trace_id="0" * 32,
    ),
    "handshake.request": handshake.AgentMetadataRequest(
        nonce=TOKEN,
        requester="prefill-1",
        requester_epoch="e1",
        process=PROCESS,
        regions=[7],
        key_id="k1",
        mac=b"m" * 32,
    ),
    "handshake.reply": handshake.AgentMetadataReply(description=b"packed", key_id="k1", mac=bytes(32)),
    "handshake.description": handshake.AgentDescription(
        worker_id="decode-1",
        epoch="e1",
        agent_name="decode-1-e1",
        agent_metadata=b"metadata",
        regions=[handshake.Region(region=0, address=4096, length_bytes=65536, memory_type="DRAM")],
    ),
    "operation.grant": GRANT,
    "operation.claim": operations.ClaimRequest(operation_id=ID, epoch="e1", initiator=INITIATOR, proof=TOKEN),
    "operation.claimed": operations.ClaimReply(operation_id=ID, lease_ms=59_000),
    "operation.ack": operations.CompletionAck(
        operation_id=ID,
        outcome=operations.AckOutcome.FAILED,
        initiator=INITIATOR,
        token=TOKEN,
        num_bytes=12672,
        fault=FAULT,
        checksum=b"s" * 16,
    ),
    "operation.status": operations.OperationStatusRequest(
        operation_id=ID, worker_id="decode-1", epoch="e1", initiator=INITIATOR, nonce=TOKEN, serial=3, proof=TOKEN
    ),
    "operation.status_reply": operations.OperationStatusReply(
        operation_id=ID,
        initiator=INITIATOR,
        state=operations.OperationState.CONCLUDED,
        proof=TOKEN,
        ack=operations.CompletionAck(
            operation_id=ID, outcome=operations.AckOutcome.COMPLETE, initiator=INITIATOR, token=TOKEN, num_bytes=12672
        ),
    ),
    "operation.epoch_drained": operations.EpochDrained(worker_id="prefill-1", epoch="e2", key_id="k1", mac=b"m" * 32),
    "operation.process_reaped": operations.ProcessReaped(
        worker_id="prefill-1", process=PROCESS, key_id="k1", mac=b"m" * 32
    ),
    "performance.request": performance.PerformanceRequest(
        target="decode-1", direction="read", sizes_bytes=[1024, 65536], repetitions=100, time_limit_ms=60_000
    ),
    "performance.report": performance.PerformanceReport(
        rows=[
            performance.PerformanceRow(
                size_bytes=1024,
                num_operations=100,
                num_bytes=102_400,
                p50_us=400.5,
                p99_us=900.25,
                wire_p50_us=20.0,
                bytes_per_s=51_200_000.0,
            )
        ],
        skipped=[performance.SkippedSize(size_bytes=65536, reason="no room")],
        backend="UCX",
        lanes="unknown",
        lanes_reason="UCX's log does not name its lanes",
    ),
    "performance.grant_request": performance.PerformanceGrantRequest(
        num_bytes=1024, direction="write", initiator=INITIATOR
    ),
    "performance.grant": performance.PerformanceGrant(grant=GRANT),
    "encode.request": stages.EncodeRequest(**STAGE, images=[b"\x89PNG"], embeddings=GRANT),
    "encode.reply": stages.EncodeReply(hops=HOPS, elapsed_ms=3.1),
    "prefill.request": stages.PrefillRequest(
        **STAGE, input_ids=[1, 2, 3], num_image_tokens=[16], images=[b"\x89PNG"], kv=GRANT
    ),
    "prefill.reply": stages.PrefillReply(token_id=17, hops=HOPS, elapsed_ms=3.1),
    "decode.request": stages.DecodeRequest(
        **STAGE,
        input_ids=[1, 2, 3],
        num_image_tokens=[16],
        images=[b"\x89PNG"],
        max_tokens=16,
        stop_token_ids=[2],
    ),
    "decode.token": stages.DecodeToken(seq=0, token_id=17),
    "decode.done": stages.DecodeDone(seq=7, finish_reason="length", hops=HOPS, elapsed_ms=3.1),
    "trace.request": traces.TraceRequest(trace_id="0" * 32),
    "trace.reply": traces.TraceReply(trace_id="0" * 32, spans=[{"name": "nixl.write", "start_ns": 1}]),
}


def message_types() -> dict[str, type[Message]]:
    """Every concrete message by its tag."""
    found = {}
    for module in MODULES:
        for _, value in inspect.getmembers(module, inspect.isclass):
            if issubclass(value, Message) and value is not Message and value.__module__ == module.__name__:
                found[str(value.__struct_config__.tag)] = value
    for base in ("StageRequest", "Frame", "LastFrame"):  # of several, no messages of their own
        found.pop(base, None)
    return found


def _strategy(info: Any) -> st.SearchStrategy[Any]:
    inspect_module = msgspec.inspect
    match info:
        case inspect_module.IntType():
            return st.integers(-(2**63) if info.ge is None else info.ge, 2**63 - 1 if info.le is None else info.le)
        case inspect_module.FloatType():
            return st.floats(allow_nan=False, allow_infinity=False)  # JSON has neither
        case inspect_module.BoolType():
            return st.booleans()
        case inspect_module.NoneType():
            return st.none()
        case inspect_module.StrType():
            if info.pattern:
                return st.from_regex(
                    info.pattern.replace("$", r"\Z"), fullmatch=True, alphabet=st.characters(max_codepoint=127)
                )
            return st.text(max_size=20)
        case inspect_module.BytesType():
            return st.binary(
                min_size=info.min_length or 0, max_size=info.max_length if (info.max_length or 99) < 99 else 40
            )
        case inspect_module.LiteralType():
            return st.sampled_from(info.values)
        case inspect_module.EnumType():
            return st.sampled_from(list(info.cls))
        case inspect_module.ListType():
            return st.lists(
                _strategy(info.item_type), min_size=info.min_length or 0, max_size=(info.min_length or 0) + 2
            )
        case inspect_module.DictType():
            return st.dictionaries(st.text(max_size=5), st.integers(-5, 5) | st.text(max_size=5), max_size=3)
        case inspect_module.UnionType():
            return st.one_of([_strategy(member) for member in info.types])
        case inspect_module.StructType():
            return struct_values(info.cls)
    raise TypeError(info)


def struct_values(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    """Any value of a struct."""
    fields = {field.name: field for field in msgspec.inspect.type_info(struct).fields}  # type: ignore[attr-defined]
    return st.builds(struct, **{name: _strategy(field.type) for name, field in fields.items()})
