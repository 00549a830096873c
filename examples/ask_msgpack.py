"""Ask a graph from any Python: nats-py and msgpack, nothing of nixlbus.

    python examples/ask_msgpack.py --server nats://127.0.0.1:4222 --image digit.png "What digit is this?"

Publishes one msgpack map with a reply subject and reads the numbered frames that come back to it.
"""

import argparse
import asyncio
import sys
from pathlib import Path

import msgpack
import nats

TIMEOUT_S = 30.0


async def ask(server: str, nkey: str | None, subject: str, prompt: str, image: bytes) -> None:
    """Publish the question and print the answer as it comes."""
    client = await nats.connect(server, nkeys_seed=nkey, inbox_prefix="_INBOX.client")
    content: list[dict[str, str | bytes]] = [{"type": "text", "text": prompt}]
    if image:
        content.insert(0, {"type": "image", "image": image})
    request = {"type": "generate.request", "messages": [{"role": "user", "content": content}]}
    reply_subject = client.new_inbox()
    replies = await client.subscribe(reply_subject)
    await client.publish(subject, msgpack.packb(request), reply=reply_subject)
    expected = 0
    while True:
        message = await replies.next_msg(timeout=TIMEOUT_S)
        if not message.data:
            sys.exit(f"nobody listens on {subject}")
        frame = msgpack.unpackb(message.data)
        if frame["type"] == "fault":
            sys.exit(f"{frame['code']}: {frame['message']}")
        if frame["seq"] != expected:
            sys.exit(f"frame {expected} is missing")
        expected += 1
        if frame["type"] == "generate.done":
            break
        print(frame["text"], end="", flush=True)
    print()
    for hop in frame["ledger"]:
        print(f"{hop['ms']:9.2f} ms {hop['bytes']:9,} bytes  {hop['name']}", file=sys.stderr)
    await client.close()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("prompt")
    arguments.add_argument("--server", default="nats://127.0.0.1:4222")
    arguments.add_argument("--nkey", help="the seed file of 'client', for a server that asks who is there")
    arguments.add_argument("--subject", default="nixlbus.v1.graph.vlm.generate")
    arguments.add_argument("--image", type=Path)
    given = arguments.parse_args()
    picture = given.image.read_bytes() if given.image else b""
    asyncio.run(ask(given.server, given.nkey, given.subject, given.prompt, picture))
