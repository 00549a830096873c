"""What each user may do on a server that runs the very file that `nixlbus nats-conf` writes: no more than is listed
here, and no less. The lists are written by hand, the verdicts are nats-server's."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nats.aio.client import Client
from nats.errors import Error

from bus import (
    Bus,
    EndpointConfig,
    JobQueueConfig,
    PeerLost,
    PermissionDenied,
    RoleAccess,
    Roles,
    RolesFileError,
    ServerSettings,
    UserFiles,
    embedded_server,
    identity_of,
    load_roles,
    with_people,
    write_server_files,
)
from bus.control_plane.inbox import PROBE_HEADER
from bus.control_plane.permissions import INITIATOR_ENDPOINTS, TARGET_ENDPOINTS, permissions
from bus.data_lane import STATUS_ENDPOINT
from bus.handshake import exchange
from bus.handshake.authentication import KeyRing
from bus.handshake.statements import claim_tokens, process_reaped
from bus.jobs.streams import Streams
from bus.operations.claim import CLAIM_ENDPOINT
from bus.operations.lifecycle import GrantState
from schemas.codec import encode
from schemas.generate import ChatMessage, GenerateChunk, GenerateDone, GenerateRequest, Usage
from schemas.operations import AckOutcome, CompletionAck, Initiator
from schemas.performance import GRANT_ENDPOINT
from schemas.protocol import PROTOCOL_HEADER, PROTOCOL_VERSION, REQUEST_ID_HEADER, TTL_HEADER
from tests.bus.control_plane.guarded_server import Guarded, guarded_server
from workers.roles.access import vlm_roles

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
    published = {*CALLS[user], *(f"_INBOX.{user}.a1.b.c" for user in USERS)}
    if user in ROLES:
        published |= {f"{P}.event.{user}.a1.drained", f"{P}.cancel.r1", *SERVICE}
    return published


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


async def test_nobody_gains_a_subject_by_hearing_its_own_message(guarded: Guarded) -> None:
    """What `allow_responses` gave: who publishes where it listens, with any reply subject, might publish to that."""
    roles = vlm_roles()
    for user in USERS:
        async with guarded.client(user) as client:
            for heard in permissions(roles, user).subscribe:
                await client.listen(*heard.split(" "))
            before = await client.may_publish(PUBLISHED)
            foreign = set(PUBLISHED) - before
            own = [*before, *(f"_INBOX.{user}.a1.{n}" for n in range(3))]
            for subject in own:
                for reply in foreign:
                    await client.nats.publish(subject, b"", reply=reply)
            await client.settle()
            assert client.heard, user
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
        assert len([frame async for frame in frames]) == 301  # more than a window: the reader's credit arrives
        assert other.heard == []


async def test_the_name_of_one_inbox_tells_nothing_of_the_others(guarded: Guarded) -> None:
    """A client learns an inbox of a worker's, where the worker listens to it, and tries the names around."""
    asked: asyncio.Queue[GenerateRequest] = asyncio.Queue()
    goes_on = asyncio.Event()
    async with (
        Bus.open(guarded.config("processor"), data_plane=False) as processor,
        Bus.open(guarded.config("decode"), data_plane=False) as decode,
        Bus.open(guarded.config("client"), data_plane=False) as victim,
        guarded.client("client") as evil,
    ):

        async def slow(request: GenerateRequest) -> GenerateRequest:
            asked.put_nowait(request)
            await goes_on.wait()
            return request

        async def generate(request: GenerateRequest) -> GenerateRequest:
            return await processor.request(decode_subject, request, GenerateRequest, timeout_s=20)

        decode_subject, subject = (decode.subjects.graph("vlm", stage) for stage in ("decode", "generate"))
        await decode.serve(EndpointConfig("decode", decode_subject, GenerateRequest, queue_group="decode"), slow)
        await processor.serve(
            EndpointConfig("generate", subject, GenerateRequest, queue_group="generate", public=True), generate
        )
        await processor._connection.flush(5)
        links: asyncio.Queue[str] = asyncio.Queue()

        async def probed(message: Any) -> None:
            links.put_nowait(message.reply)

        await evil.nats.subscribe("_INBOX.client.x.e", cb=probed)
        headers = {REQUEST_ID_HEADER: "abc"}
        await evil.nats.publish(subject.name, encode(QUESTION), reply="_INBOX.client.x.e", headers=headers)
        async with asyncio.timeout(20):
            link = await links.get()
            await asked.get()
            waiting = asyncio.create_task(victim.request(subject, QUESTION, GenerateRequest, timeout_s=20))
            await asked.get()
            inbox, _, token = link.rpartition(".")
            for guess in range(max(0, int(token, 16) - 20), int(token, 16) + 20):
                await evil.nats.publish(f"{inbox}.{guess:x}", b"forged")
                await evil.nats.publish(subject.name, b"nonsense", reply=f"{inbox}.{guess:x}")
            await evil.settle()
            await processor._connection.flush(5)
            goes_on.set()
            assert await waiting == QUESTION


async def test_a_caller_hears_that_its_worker_is_gone_and_a_worker_that_its_caller_is(guarded: Guarded) -> None:
    cancelled, begun = asyncio.Event(), asyncio.Event()
    subject = f"{P}.graph.vlm.generate"
    async with Bus.open(guarded.config("client"), data_plane=False) as caller:
        async with guarded.client("processor") as worker:

            async def probe(message: Any) -> None:
                headers = {PROBE_HEADER: "1"}
                await worker.nats.publish(message.reply, b"", reply="_INBOX.processor.x.link", headers=headers)
                await worker.nats.flush()
                begun.set()

            await worker.nats.subscribe(subject, queue="generate", cb=probe)
            await worker.settle()
            asking = caller.request(caller.subjects.graph("vlm", "generate"), QUESTION, GenerateRequest, timeout_s=30)
            waiting = asyncio.create_task(asking)
            await asyncio.wait_for(begun.wait(), 10)
        async with asyncio.timeout(20):
            with pytest.raises(PeerLost):
                await waiting

    async def forever(request: GenerateRequest) -> GenerateRequest:
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return request

    async with Bus.open(guarded.config("processor"), data_plane=False) as bus:
        config = EndpointConfig(
            "generate", bus.subjects.graph("vlm", "generate"), GenerateRequest, queue_group="generate"
        )
        await bus.serve(config, forever)
        await bus._connection.flush(5)
        begun.clear()
        async with guarded.client("client") as asker:
            await asker.listen("_INBOX.client.x.e")
            headers = {PROTOCOL_HEADER: str(PROTOCOL_VERSION), REQUEST_ID_HEADER: "abc", TTL_HEADER: "60000"}
            await asker.nats.publish(subject, encode(QUESTION), reply="_INBOX.client.x.e", headers=headers)
            await asyncio.wait_for(begun.wait(), 10)
        await asyncio.wait_for(cancelled.wait(), 20)


async def test_a_worker_is_not_made_to_publish_where_its_asker_may_not(guarded: Guarded) -> None:
    """The server would let a worker answer on what its role may publish; the worker refuses the bus's own subjects."""
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


MEDIA_ROLES = with_people(
    Roles(
        graph="media",
        roles={
            "api": RoleAccess(submits=["transcode"]),
            "transcoder": RoleAccess(works=["transcode"]),
            "store": RoleAccess(media=True),
            "victim": RoleAccess(serves=["pay"], works=["secret"]),
            "thief": RoleAccess(works=["other"], submits=["other"]),
        },
    )
)
TRANSCODE, SECRET, OTHER = (
    JobQueueConfig(graph="media", queue=queue, message_type=GenerateRequest, max_deliver=1, idempotent_handler=alone)
    for queue, alone in (("transcode", False), ("secret", False), ("other", True))
)


async def test_durable_work_is_done_without_the_right_to_make_anything(tmp_path: Path) -> None:
    runs: list[GenerateRequest] = []

    async def fail_once(request: GenerateRequest) -> None:
        runs.append(request)
        if len(runs) == 1:
            raise ValueError("once")

    async with (
        guarded_server(tmp_path, roles=MEDIA_ROLES) as guarded,
        Bus.open(guarded.config("transcoder"), data_plane=False) as worker,
        Bus.open(guarded.config("api"), data_plane=False) as api,
        Bus.open(guarded.config("store"), data_plane=False) as store,
        Bus.open(guarded.config("operator"), data_plane=False) as operator,
        Bus.open(guarded.config("provisioner"), data_plane=False) as provisioner,
    ):
        with pytest.raises(PermissionDenied, match=r"STREAM\.CREATE"):
            await worker.work(TRANSCODE, fail_once)
        with pytest.raises(PermissionDenied, match=r"STREAM\.CREATE"):
            await api.submit(TRANSCODE, QUESTION)
        with pytest.raises(PermissionDenied, match=r"STREAM\.CREATE"):
            await store.media.put(None, b"pixels")
        names = await provisioner.provision([TRANSCODE, SECRET, OTHER], media=True)
        assert names == await provisioner.provision([TRANSCODE, SECRET, OTHER], media=True)
        assert set(names) == {
            "NIXLBUS_JOBS", "NIXLBUS_DLQ", "KV_NIXLBUS_CLAIMS", "OBJ_NIXLBUS_MEDIA",
            *(f"NIXLBUS_JOBS.{queue.durable}" for queue in (TRANSCODE, SECRET, OTHER)),
        }  # fmt: skip
        await worker.work(TRANSCODE, fail_once)
        receipt = await api.submit(TRANSCODE, QUESTION)
        async with asyncio.timeout(20):
            while not (letters := await operator.dead_letters.list()):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            (letter,) = letters
            assert letter.job_id == receipt.job_id
            await operator.dead_letters.replay(letter.sequence)
            while worker._durable.consumers[0].stats.num_done < 1:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        assert runs == [QUESTION, QUESTION]
        reference = await store.media.put(None, b"pixels")
        assert await store.media.get(reference) == b"pixels"
        await store.media.delete(reference)


async def test_a_role_that_provisions_makes_what_it_misses(tmp_path: Path) -> None:
    roles = Roles(graph="media", roles={"transcoder": RoleAccess(works=["transcode"], provisions=True)})
    async with (
        guarded_server(tmp_path, roles=with_people(roles)) as guarded,
        Bus.open(guarded.config("transcoder"), data_plane=False) as worker,
    ):

        async def handle(request: GenerateRequest) -> None:
            """Nothing."""

        await worker.work(TRANSCODE, handle)
        assert await worker.provision([TRANSCODE])


async def test_what_is_durable_is_made_by_the_provisioner_and_used_by_its_own_roles_alone(tmp_path: Path) -> None:
    streams = ("NIXLBUS_JOBS", "NIXLBUS_DLQ", "KV_NIXLBUS_CLAIMS", "OBJ_NIXLBUS_MEDIA")
    stream, subject = "NIXLBUS_JOBS", f"{P}.job.media.transcode"
    consumer = f"{stream}.{TRANSCODE.durable}"
    made = {f"$JS.API.STREAM.CREATE.{name}" for name in streams} | {
        f"$JS.API.CONSUMER.DURABLE.CREATE.{stream}.{queue.durable}" for queue in (TRANSCODE, SECRET, OTHER)
    }
    denied = [
        *(f"$JS.API.STREAM.{verb}.{name}" for verb in ("UPDATE", "DELETE", "MSG.GET", "SNAPSHOT") for name in streams),
        *(f"$JS.API.CONSUMER.CREATE.{name}{rest}" for name in streams for rest in ("", ".x", ".x.y")),
        *(f"$JS.API.CONSUMER.MSG.NEXT.{name}.x" for name in streams),
        *(f"$JS.FC.{name}.x" for name in streams),
        f"$JS.API.CONSUMER.CREATE.{consumer}.{subject}",
        f"$JS.API.CONSUMER.DELETE.{consumer}",
        "$JS.API.STREAM.CREATE.TAP",
        "$JS.API.STREAM.PURGE.NIXLBUS_JOBS",
        "$JS.API.STREAM.NAMES",
    ]
    used = {
        f"$JS.API.CONSUMER.MSG.NEXT.{consumer}": {"transcoder"},
        f"$JS.ACK.{consumer}.1.1.1.1.1": {"transcoder"},
        f"{P}.dlq.media.transcode": {"transcoder"},
        subject: {"api", "operator"},
        "$JS.API.STREAM.MSG.DELETE.NIXLBUS_DLQ": {"operator"},
        "$O.NIXLBUS_MEDIA.C.x": {"store"},
        "$KV.NIXLBUS_CLAIMS.x": {"transcoder", "victim", "thief"},
    }
    heard = [f"{P}.job.>", f"{P}.dlq.>", "$JS.API.>", "$JS.EVENT.>", "$KV.>", "$O.>"]
    async with guarded_server(tmp_path, roles=MEDIA_ROLES) as guarded:
        for user in MEDIA_ROLES.roles:
            async with guarded.client(user) as client:
                wanted = {each for each, users in used.items() if user in users}
                wanted |= made if user == "provisioner" else set()
                assert await client.may_publish([*denied, *made, *used]) == wanted, user
                assert await client.may_subscribe(heard) == set(), user


def with_an_account_more(file: str, public_key: str) -> Path:
    path = Path(file)
    other = f"  OTHER {{ users: [ {{ nkey: {public_key} }} ] }}\n  SYS {{"
    path.write_text(path.read_text().replace("  SYS {", other))
    return path


async def test_who_may_ask_jetstream_makes_it_answer_anywhere_within_the_account_and_not_outside(
    tmp_path: Path,
) -> None:
    """What docs/security.md says it doesn't do, and what separates nevertheless."""
    import nkeys

    seed = nkeys.encode_seed(secrets.token_bytes(32), nkeys.PREFIX_BYTE_USER)
    seed_file = tmp_path / "other.nkey"
    seed_file.write_bytes(seed)
    public_key = nkeys.from_seed(bytearray(seed)).public_key.decode()
    settings = ServerSettings(port=-1, monitoring_port=-1, store_dir=str(tmp_path / "jetstream"))
    files = write_server_files(tmp_path / "conf", MEDIA_ROLES, settings)
    configuration = with_an_account_more(files.configuration, public_key)
    files.users["outside"] = UserFiles(nkey=str(seed_file))
    async with embedded_server(configuration=configuration) as server:
        guarded = Guarded(server, files)
        async with (
            Bus.open(guarded.config("provisioner"), data_plane=False) as provisioner,
            guarded.client("thief") as thief,
            guarded.client("victim") as victim,
            guarded.client("outside") as outside,
        ):
            await provisioner.provision([OTHER])
            await outside.listen(">")
            await victim.listen(f"{P}.worker.victim.a1.claim")
            await victim.listen(f"{P}.graph.media.pay", "pay")
            targets = [f"{P}.worker.victim.a1.claim", f"{P}.graph.media.pay"]
            assert await thief.may_publish(targets) == set()
            await thief.nats.publish("$KV.NIXLBUS_CLAIMS.x", b"forged")
            await thief.settle()
            question = json.dumps({"last_by_subj": "$KV.NIXLBUS_CLAIMS.x"}).encode()
            for target in targets:
                await thief.nats.publish("$JS.API.DIRECT.GET.KV_NIXLBUS_CLAIMS", question, reply=target)
            async with asyncio.timeout(10):
                while set(victim.heard) != set(targets):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            await outside.settle()
            assert outside.heard == []


def test_the_names_in_jetstream_are_those_that_are_made() -> None:
    streams = Streams("nixlbus", 1, 60.0)
    granted = permissions(MEDIA_ROLES, "provisioner").publish
    for stream in (streams.jobs, streams.dead_letters, streams.claims, streams.media):
        assert f"$JS.API.STREAM.CREATE.{stream.name}" in granted
    assert f"$JS.API.CONSUMER.DURABLE.CREATE.NIXLBUS_JOBS.{SECRET.durable}" in granted
    assert f"{streams.claims.subjects[0]}" in permissions(MEDIA_ROLES, "transcoder").publish
    assert f"$O.{streams.media_bucket}.>" in permissions(MEDIA_ROLES, "store").publish


def test_the_monitoring_port_is_on_loopback_wherever_clients_connect(tmp_path: Path) -> None:
    settings = ServerSettings(host="0.0.0.0", store_dir="/data")
    written = write_server_files(tmp_path, vlm_roles(), settings)
    assert {'listen: "0.0.0.0:4222"', 'http: "127.0.0.1:8222"'} <= set(
        Path(written.configuration).read_text().splitlines()
    )


def test_the_endpoints_of_an_operation_are_those_that_operations_ask() -> None:
    assert set(TARGET_ENDPOINTS) == {exchange.ENDPOINT, CLAIM_ENDPOINT, GRANT_ENDPOINT}
    assert set(INITIATOR_ENDPOINTS) == {STATUS_ENDPOINT}


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
    assert f"$JS.API.CONSUMER.MSG.NEXT.NIXLBUS_JOBS.{TRANSCODE.durable}" in permissions(roles, "store").publish
    assert permissions(roles, "web").subscribe == ["_INBOX.web.>"]
    assert not any(roles.moves_tensors(name) for name in ("api", "web", "operator"))
    assert roles.moves_tensors("store")
    assert all(s.startswith(("acme.v1.", "_INBOX.")) for s in permissions(roles, "web", prefix="acme").publish)


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
