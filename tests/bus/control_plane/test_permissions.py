"""What each user may do on a server that runs the very file that `nixlbus nats-conf` writes: no more than is listed
here, and no less. The lists are written by hand, the verdicts are nats-server's."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch
from nats.aio.client import Client
from nats.errors import Error
from nats.js.api import AckPolicy, ConsumerConfig, RetentionPolicy

from bus import (
    Bus,
    EndpointConfig,
    PeerLost,
    PermissionDenied,
    RoleAccess,
    Roles,
    RolesFileError,
    identity_of,
    load_roles,
    with_people,
)
from bus.control_plane.endpoint import MAX_TTL_S
from bus.control_plane.permissions import INITIATOR_ENDPOINTS, TARGET_ENDPOINTS, permissions
from bus.control_plane.server_configuration import LONGEST_REQUEST_S
from bus.data_lane import STATUS_ENDPOINT
from bus.handshake import exchange
from bus.handshake.authentication import KeyRing
from bus.handshake.statements import claim_tokens, process_reaped
from bus.operations.claim import CLAIM_ENDPOINT
from bus.operations.lifecycle import GrantState
from schemas.codec import encode
from schemas.generate import ChatMessage, GenerateChunk, GenerateDone, GenerateRequest, Usage
from schemas.operations import AckOutcome, CompletionAck, Initiator
from schemas.performance import GRANT_ENDPOINT
from tests.bus.control_plane.guarded_server import Guarded, guarded_server

ROLES = ("frontend", "processor", "decode", "prefill", "encode", "traces")
USERS = (*ROLES, "client", "operator", "observer")
STAGES = ("generate", "decode", "prefill", "encode")
ENDPOINTS = ("agent_metadata", "claim", "operation_status", "perf", "perf_grant", "trace")
P = "nixlbus.v1"
SERVICE = [f"$SRV.{verb}{rest}" for verb in ("PING", "INFO", "STATS") for rest in ("", ".nixlbus-vlm-x.y")]

PUBLISHED = [
    *(f"{P}.graph.vlm.{stage}" for stage in STAGES),
    f"{P}.graph.other.generate",
    *(f"{P}.worker.{role}.a1.{endpoint}" for role in ROLES for endpoint in ENDPOINTS),
    f"{P}.worker.traces.trace",
    *(f"{P}.ack.{role}.a1.0123456789abcdef" for role in ROLES),
    *(f"{P}.event.{role}.a1.drained" for role in ROLES),
    f"{P}.cancel.r1",
    *(f"_INBOX.{user}.a1.b.c" for user in USERS),
    f"{P}.job.vlm.q",
    f"{P}.dlq.vlm.q",
    "$JS.API.STREAM.INFO.NIXLBUS_DLQ",
    "$JS.API.STREAM.CREATE.NIXLBUS_JOBS",
    "$JS.API.STREAM.DELETE.NIXLBUS_JOBS",
    "$JS.API.STREAM.UPDATE.NIXLBUS_JOBS",
    "$SYS.REQ.SERVER.PING",
    *SERVICE,
]
CALLS = {
    "frontend": {f"{P}.graph.vlm.generate"},
    "processor": {f"{P}.graph.vlm.decode"},
    "decode": {f"{P}.graph.vlm.prefill", f"{P}.worker.prefill.a1.operation_status"},
    "prefill": {
        f"{P}.graph.vlm.encode",
        f"{P}.worker.encode.a1.operation_status",
        *(f"{P}.worker.decode.a1.{endpoint}" for endpoint in ("agent_metadata", "claim", "perf_grant")),
        f"{P}.ack.decode.a1.0123456789abcdef",
    },
    "encode": {
        *(f"{P}.worker.prefill.a1.{endpoint}" for endpoint in ("agent_metadata", "claim", "perf_grant")),
        f"{P}.ack.prefill.a1.0123456789abcdef",
    },
    "traces": set(),
    "client": {f"{P}.graph.vlm.generate", f"{P}.cancel.r1"},
    "operator": {
        f"{P}.worker.traces.trace",
        f"{P}.worker.traces.a1.trace",
        *(f"{P}.worker.{role}.a1.perf" for role in ROLES),
        f"{P}.cancel.r1",
        f"{P}.job.vlm.q",
        "$JS.API.STREAM.INFO.NIXLBUS_DLQ",
        *SERVICE,
    },
    "observer": set(SERVICE),
}
SUBSCRIBED = [
    *(f"{P}.graph.vlm.{stage}" for stage in STAGES),
    *(f"{P}.graph.vlm.{stage} {group}" for stage in STAGES for group in (*STAGES, "tap")),
    f"{P}.graph.>",
    f"{P}.>",
    ">",
    "_INBOX.>",
    *(f"_INBOX.{user}.>" for user in USERS),
    *(f"_INBOX.{user}.a1.b.*" for user in USERS),
    *(f"{P}.worker.{role}.a1.claim" for role in ROLES),
    f"{P}.worker.>",
    *(f"{P}.ack.{role}.a1.*" for role in ROLES),
    f"{P}.ack.>",
    f"{P}.event.*.*.drained",
    f"{P}.event.*.drained",
    f"{P}.cancel.r1",
    f"{P}.job.>",
    f"{P}.dlq.>",
    "$JS.API.>",
    "$SYS.>",
    *SERVICE,
]
QUESTION = GenerateRequest(messages=[ChatMessage(role="user", content="hello")])
SERVES = {"processor": "generate", "decode": "decode", "prefill": "prefill", "encode": "encode"}


def published_by(user: str) -> set[str]:
    if user not in ROLES:
        return CALLS[user]
    return {*CALLS[user], f"{P}.event.{user}.a1.drained", f"{P}.cancel.r1", *SERVICE}


def heard_by(user: str) -> set[str]:
    heard = {f"_INBOX.{user}.>", f"_INBOX.{user}.a1.b.*"}
    if user in SERVES:
        heard.add(f"{P}.graph.vlm.{SERVES[user]} {SERVES[user]}")
    if user in ("decode", "prefill", "encode"):
        heard.add(f"{P}.ack.{user}.a1.*")
    if user in ROLES:
        heard |= {f"{P}.worker.{user}.a1.claim", f"{P}.cancel.r1", *SERVICE}
    if user != "client":
        heard |= {f"{P}.event.*.*.drained", f"{P}.event.*.drained"}
    return heard


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    async with guarded_server(tmp_path) as server:
        yield server


async def test_each_user_publishes_to_what_is_listed_and_to_nothing_else(guarded: Guarded) -> None:
    for user in USERS:
        async with guarded.client(user) as client:
            assert await client.may_publish(PUBLISHED) == published_by(user), user


async def test_each_user_subscribes_to_what_is_listed_and_to_nothing_else(guarded: Guarded) -> None:
    for user in USERS:
        async with guarded.client(user) as client:
            assert await client.may_subscribe(SUBSCRIBED) == heard_by(user), user


async def test_who_has_no_key_is_refused(guarded: Guarded) -> None:
    client = Client()
    with pytest.raises(Error, match="Authorization"):
        await client.connect(guarded.url, allow_reconnect=False)
    await client.close()


async def test_a_worker_that_may_not_have_its_inbox_fails_to_open_and_says_so(guarded: Guarded) -> None:
    config = guarded.config("encode", worker_id="decode.a1")
    with pytest.raises(PermissionDenied, match=r"_INBOX\.decode\.a1.*set NIXLBUS_IDENTITY"):
        async with Bus.open(config, data_plane=False):
            pass


async def test_a_role_can_not_serve_another_role_s_stage(guarded: Guarded) -> None:
    async with Bus.open(guarded.config("encode"), data_plane=False) as bus:
        config = EndpointConfig("decode", bus.subjects.graph("vlm", "decode"), GenerateRequest, queue_group="decode")
        with pytest.raises(PermissionDenied, match=r"graph\.vlm\.decode"):
            await bus.serve(config, lambda request: request)
        own = EndpointConfig("encode", bus.subjects.graph("vlm", "encode"), GenerateRequest, queue_group="encode")
        await bus.serve(own, lambda request: request)  # what was denied is told once


async def test_a_request_that_is_not_granted_fails_at_once_and_not_at_its_deadline(guarded: Guarded) -> None:
    async with Bus.open(guarded.config("client"), data_plane=False) as client:
        async with asyncio.timeout(10):
            with pytest.raises(PermissionDenied, match="grant the subject to this user"):
                await client.request(client.subjects.graph("vlm", "decode"), QUESTION, GenerateDone, timeout_s=60)


async def test_the_client_gets_the_frames_of_its_answer_and_nobody_else_does(guarded: Guarded) -> None:
    async with (
        guarded.client("frontend") as other,
        Bus.open(guarded.config("processor"), data_plane=False) as processor,
        Bus.open(guarded.config("client"), data_plane=False) as client,
    ):

        async def generate(request: GenerateRequest):  # type: ignore[no-untyped-def]
            for number in range(300):
                yield GenerateChunk(seq=number, text="x", token_ids=[])
            yield GenerateDone(
                seq=300, finish_reason="stop", model="m", usage=Usage(prompt_tokens=0, completion_tokens=0),
                ledger=[], elapsed_ms=0.0, request_id="r", trace_id="",
            )  # fmt: skip

        subject = processor.subjects.graph("vlm", "generate")
        config = EndpointConfig("generate", subject, GenerateRequest, queue_group="generate", public=True)
        await processor.serve(config, generate)
        await other.listen("_INBOX.>")
        frames = client.stream(subject, QUESTION, GenerateChunk, GenerateDone, timeout_s=10)
        assert len([frame async for frame in frames]) == 301
        assert other.heard == []


async def test_a_worker_is_not_made_to_publish_where_its_asker_may_not(guarded: Guarded) -> None:
    """With allow_responses the server lets a worker answer on any subject; the worker itself refuses the bus's own."""
    async with (
        Bus.open(guarded.config("processor"), data_plane=False) as processor,
        guarded.client("decode") as decode,
        guarded.client("client") as client,
    ):

        async def generate(request: GenerateRequest) -> GenerateRequest:
            return request

        subject = processor.subjects.graph("vlm", "generate")
        await processor.serve(
            EndpointConfig("generate", subject, GenerateRequest, queue_group="generate", public=True), generate
        )
        await processor.announce("nixlbus-vlm-processor", "1", {})
        await decode.listen(f"{P}.graph.vlm.decode", "decode")
        await decode.listen(f"{P}.ack.decode.>")
        for reply in (f"{P}.graph.vlm.decode", f"{P}.ack.decode.a1.0123456789abcdef"):
            await client.nats.publish(subject.name, encode(QUESTION), reply=reply)
        await client.settle()
        await processor._connection.flush(5)
        assert processor._endpoints[0].stats.num_errors == 2
        await decode.settle()
        assert decode.heard == []


async def test_no_role_completes_an_operation_that_is_another_s(guarded: Guarded, tmp_path: Path) -> None:
    """encode has the shared key, so it can make the token of an ack to decode; it can't get the ack there."""
    async with (
        Bus.open(guarded.config("decode")) as decode,
        Bus.open(guarded.config("prefill")) as prefill,
        Bus.open(guarded.config("encode")) as encode_bus,
    ):
        with (
            decode.arena.allocate([1024], torch.uint8) as target,
            encode_bus.arena.allocate([1024], torch.uint8) as own,
        ):
            async with await decode.create_writable(target.descriptor, lease_s=20) as writable:
                grant = writable.metadata
                with pytest.raises(PermissionDenied):
                    await encode_bus.begin_write(grant, own.descriptor)
                claim = await prefill.claim(grant)
                identity = Initiator(worker_id=prefill.worker_id, epoch=prefill.epoch)
                keys = KeyRing.load(encode_bus.config.key_file)
                token = claim_tokens(keys, grant.operation_id, grant.epoch, identity)[0]
                forged = CompletionAck(
                    operation_id=grant.operation_id, outcome=AckOutcome.COMPLETE, initiator=identity, token=token,
                    num_bytes=grant.num_bytes,
                )  # fmt: skip
                await encode_bus.publish(encode_bus.subjects.ack(decode.worker_id, grant.operation_id), forged)
                await encode_bus._connection.flush(5)
                await decode._connection.flush(5)
                assert decode.stats()["grants_open"] == 1
                with prefill.arena.allocate([1024], torch.uint8) as source:
                    source.tensor.fill_(7)
                    await (await prefill.begin_write(claim, source.descriptor))
                await writable
                assert bool((target.tensor == 7).all())


async def test_the_end_of_a_worker_is_heard_from_its_own_role_and_from_no_other(guarded: Guarded) -> None:
    process = identity_of(os.getpid())
    assert process is not None
    async with (
        Bus.open(guarded.config("decode")) as decode,
        Bus.open(guarded.config("prefill")) as prefill,
        guarded.client("encode") as encode_client,
    ):
        with decode.arena.allocate([64], torch.uint8) as target:
            operation = await decode.create_writable(target.descriptor, lease_s=20)
            claim = await prefill.claim(operation.metadata)
            keys = KeyRing.load(decode.config.key_file)
            report = encode(process_reaped(keys, prefill.worker_id, process))
            await encode_client.nats.publish(f"{P}.event.{prefill.worker_id}.reaped", report)
            await encode_client.settle()
            await decode._connection.flush(5)
            assert operation.state is GrantState.CLAIMED
            shared_key = guarded.files.users["prefill"].shared_key
            async with Bus.open(guarded.config("prefill"), data_plane=False) as supervisor:
                assert supervisor.config.key_file == shared_key
                await supervisor.report_reaped(prefill.worker_id, process)
            async with asyncio.timeout(10):
                with pytest.raises(PeerLost):
                    await operation
            claim.release()


async def test_with_keys_per_instance_a_worker_hears_nothing_of_its_twin(tmp_path: Path) -> None:
    async with guarded_server(tmp_path, keys_per_instance={"encode": 2}) as guarded:
        assert "encode" not in guarded.files.users
        assert guarded.config("encode.2").worker_id == "encode.2"
        async with guarded.client("encode.1") as client:
            allowed = await client.may_subscribe(
                [f"{left}.encode.{n}.{right}" for n in (1, 2)
                 for left, right in (("_INBOX", ">"), (f"{P}.ack", "*"), (f"{P}.worker", "claim"))]
                + [f"{P}.graph.vlm.encode encode"]
            )  # fmt: skip
            assert allowed == {
                "_INBOX.encode.1.>", f"{P}.ack.encode.1.*", f"{P}.worker.encode.1.claim", f"{P}.graph.vlm.encode encode"
            }  # fmt: skip
            events = [f"{P}.event.encode.{n}.drained" for n in (1, 2)]
            assert await client.may_publish(events) == {events[0]}
        async with Bus.open(guarded.config("encode.1"), data_plane=False) as bus:
            assert await bus.services(timeout_s=0.5) == []


async def test_durable_work_is_done_with_the_rights_of_its_queue_and_not_with_another_s(tmp_path: Path) -> None:
    roles = Roles(
        graph="media",
        roles={
            "api": RoleAccess(submits=["transcode"]),
            "transcoder": RoleAccess(works=["transcode"]),
            "thief": RoleAccess(works=["other"], submits=["other"]),
        },
    )
    stream, consumer, subject = "NIXLBUS_JOBS", "media_transcode", f"{P}.job.media.transcode"
    async with (
        guarded_server(tmp_path, roles=with_people(roles)) as guarded,
        guarded.client("transcoder") as worker,
        guarded.client("api") as api,
        guarded.client("thief") as thief,
        guarded.client("operator") as operator,
    ):
        jetstream = worker.nats.jetstream()
        await jetstream.add_stream(name=stream, subjects=[f"{P}.job.>"], retention=RetentionPolicy.WORK_QUEUE)
        await jetstream.add_stream(name="NIXLBUS_DLQ", subjects=[f"{P}.dlq.>"], allow_direct=True)
        settings = ConsumerConfig(durable_name=consumer, filter_subject=subject, ack_policy=AckPolicy.EXPLICIT)
        await jetstream.add_consumer(stream, settings)
        for _ in range(2):
            await api.nats.jetstream().publish(subject, b"job")
        pulled = await jetstream.pull_subscribe_bind(consumer, stream)
        first, second = await pulled.fetch(2, timeout=5)
        await first.ack_sync()
        await jetstream.publish(f"{P}.dlq.media.transcode", second.data)
        await second.term()
        letter = await operator.nats.jetstream().get_msg("NIXLBUS_DLQ", 1)
        assert letter.data == b"job"
        await operator.nats.jetstream().publish(subject, b"again")
        await operator.nats.jetstream().delete_msg("NIXLBUS_DLQ", 1)

        forbidden = [
            subject,
            f"$JS.API.CONSUMER.MSG.NEXT.{stream}.{consumer}",
            f"$JS.API.CONSUMER.CREATE.{stream}.{consumer}.{subject}",
            f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{consumer}",
            f"$JS.API.CONSUMER.DELETE.{stream}.{consumer}",
            f"$JS.API.STREAM.DELETE.{stream}",
            f"$JS.API.STREAM.UPDATE.{stream}",
            f"$JS.API.STREAM.PURGE.{stream}",
            f"$JS.API.STREAM.MSG.GET.{stream}",
            "$JS.API.STREAM.MSG.DELETE.NIXLBUS_DLQ",
            f"$JS.ACK.{stream}.{consumer}.1.1.1.1.1",
            f"{P}.dlq.media.transcode",
        ]
        assert await thief.may_publish(forbidden) == set()
        assert await api.may_publish(forbidden) == {subject}
        assert await thief.may_subscribe([f"{P}.job.>", f"{P}.dlq.>", "$JS.API.>", "$JS.EVENT.>"]) == set()


def test_the_endpoints_of_an_operation_are_those_that_operations_ask() -> None:
    assert set(TARGET_ENDPOINTS) == {exchange.ENDPOINT, CLAIM_ENDPOINT, GRANT_ENDPOINT}
    assert set(INITIATOR_ENDPOINTS) == {STATUS_ENDPOINT}
    assert LONGEST_REQUEST_S == MAX_TTL_S


def test_roles_of_one_s_own_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "roles.toml"
    path.write_text(
        'graph = "media"\n[roles.api]\ncalls = ["resize", "vlm.generate"]\nsubmits = ["transcode"]\n'
        '[roles.resize]\nserves = ["resize fast"]\nwrites_to = ["store"]\n'
        '[roles.store]\nworks = ["transcode"]\n[roles.web]\nonly_asks = true\ncalls = ["resize"]\n'
    )
    roles = load_roles(path)
    api = permissions(roles, "api")
    assert {f"{P}.graph.media.resize", f"{P}.graph.vlm.generate", f"{P}.job.media.transcode"} <= set(api.publish)
    assert f"{P}.graph.media.resize fast" in permissions(roles, "resize").subscribe
    assert "$JS.API.CONSUMER.MSG.NEXT.NIXLBUS_JOBS.media_transcode" in permissions(roles, "store").publish
    assert permissions(roles, "web").subscribe == ["_INBOX.web.>"]
    assert not any(roles.moves_tensors(name) for name in ("api", "web", "operator"))
    assert roles.moves_tensors("store")
    assert all(subject.startswith("acme.v1.") for subject in permissions(roles, "web", prefix="acme").publish)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("graph = 3", "Expected `str`"),
        ('graph = "a.b"\n[roles]', "graph"),
        ('graph = "g"\n[roles.a]\nserves = ["x y z"]', "serves"),
        ('graph = "g"\n[roles.a]\nserves = ["*"]', "serves"),
        ('graph = "g"\n[roles.a]\nwrites_to = ["b"]', "no role here"),
        ('graph = "g"\n[roles.a]\nonly_asks = true\nserves = ["x"]', "only asks"),
        ('graph = "g"\n[roles.a]\nserved = ["x"]', "unknown field"),
        ('graph = "g"\n[roles."a.b"]\n', "roles"),
        ('graph = "g"\n[roles.server]\n', "server"),
        ("graph = ", "roles.toml"),
    ],
)
def test_a_file_of_roles_that_can_not_be_used_is_an_error_that_says_why(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "roles.toml"
    path.write_text(text)
    with pytest.raises(RolesFileError, match=why):
        load_roles(path)


def test_a_raw_subject_in_a_role_can_not_break_out_of_the_configuration(tmp_path: Path) -> None:
    for hostile in ('x"] } }', "a b c", "a\nb", "", "a..b", "${PATH}", "a\\"):
        path = tmp_path / "roles.toml"
        path.write_text(f'graph = "g"\n[roles.a]\npublish = [{json.dumps(hostile)}]')
        with pytest.raises(RolesFileError):
            load_roles(path)
