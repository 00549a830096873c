"""What a worker of protocol version 1 gets from one of this version: answers to plain requests, no handshake.

There is no such worker here; its messages are sent as it packed them.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
from nats.aio.client import Client

from bus import Bus, BusConfig, EmbeddedServer, EndpointConfig, write_key_file
from schemas.protocol import PROTOCOL_VERSION
from tests.upgrade.peer import Ask, Count, Peer
from tests.upgrade.versions import HERE

HEADERS = {"Nixlbus-Protocol": "1", "Nixlbus-Ttl-Ms": "10000"}

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def raw(server: EmbeddedServer) -> AsyncIterator[Client]:
    client = Client()
    await client.connect(server.url)
    yield client
    await client.close()


@pytest_asyncio.fixture(loop_scope="module")
async def serving(server: EmbeddedServer, tmp_path: Path) -> AsyncIterator[Bus]:
    write_key_file(tmp_path / "key")
    config = BusConfig(worker_id="serving", nats_url=server.url, key_file=str(tmp_path / "key"), arena_bytes=1 << 20)
    async with Bus.open(config) as opened:
        peer = Peer(opened)
        await opened.serve(EndpointConfig("ask", opened.subjects.worker("serving", "ask"), Ask), peer.ask)
        await opened.serve(EndpointConfig("count", opened.subjects.worker("serving", "count"), Count), peer.count)
        yield opened


async def test_its_plain_request_is_answered(serving: Bus, raw: Client) -> None:
    subject = serving.subjects.worker("serving", "ask").name
    request = msgpack.packb({"type": "upgrade.ask", "text": "hi"})
    reply = await raw.request(subject, request, timeout=10, headers=HEADERS)
    assert msgpack.unpackb(reply.data) == {"type": "upgrade.told", "text": "hi", "worker_id": "serving"}


async def test_its_stream_is_answered_whole(serving: Bus, raw: Client) -> None:
    inbox = raw.new_inbox()
    subscription = await raw.subscribe(inbox)
    request = msgpack.packb({"type": "upgrade.count", "num_frames": 1000})
    await raw.publish(serving.subjects.worker("serving", "count").name, request, reply=inbox, headers=HEADERS)
    frames = [msgpack.unpackb((await subscription.next_msg(timeout=10)).data) for _ in range(1001)]
    assert [frame["seq"] for frame in frames] == list(range(1001))
    assert frames[-1]["type"] == "upgrade.count_end"


async def test_its_handshake_is_refused_with_a_fault_that_says_why(serving: Bus, raw: Client) -> None:
    golden = json.loads((HERE.parent / "schemas" / "golden_of_version_1.json").read_text())
    subject = serving.subjects.worker("serving", "agent_metadata").name
    question = bytes.fromhex(golden["handshake.request"])
    reply = await raw.request(subject, question, timeout=10, headers=HEADERS)
    fault = msgpack.unpackb(reply.data)
    assert (fault["type"], fault["code"]) == ("fault", "permission_denied")
    assert "not signed" in fault["message"]
    assert "upgrade that worker" in fault["remedy"]


async def test_a_version_that_is_not_supported_is_refused(serving: Bus, raw: Client) -> None:
    subject = serving.subjects.worker("serving", "ask").name
    request = msgpack.packb({"type": "upgrade.ask"})
    replies = [
        raw.request(subject, request, timeout=10, headers={"Nixlbus-Protocol": it})
        for it in ("0", str(PROTOCOL_VERSION + 1))
    ]
    for reply in await asyncio.gather(*replies):
        assert msgpack.unpackb(reply.data)["code"] == "wrong_protocol"
