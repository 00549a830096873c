"""Ask a graph in JSON: what the plain `nats` command line can do too.

    python examples/ask_json.py --server nats://127.0.0.1:4222 --image digit.png "What digit is this?"

A request in JSON is answered in JSON; image bytes are base64.
"""

import argparse
import asyncio
import base64
import json
import sys
from pathlib import Path

import nats

TIMEOUT_S = 30.0


async def ask(server: str, nkey: str | None, subject: str, prompt: str, image: bytes) -> None:
    """Publish the question and print the answer as it comes."""
    client = await nats.connect(server, nkeys_seed=nkey, inbox_prefix="_INBOX.client")
    content = [{"type": "text", "text": prompt}]
    if image:
        content.insert(0, {"type": "image", "image": base64.b64encode(image).decode()})
    request = {"messages": [{"role": "user", "content": content}]}
    reply_subject = client.new_inbox()
    replies = await client.subscribe(reply_subject)
    await client.publish(subject, json.dumps(request).encode(), reply=reply_subject)
    while True:
        message = await replies.next_msg(timeout=TIMEOUT_S)
        if not message.data:
            sys.exit(f"nobody listens on {subject}")
        frame = json.loads(message.data)
        if frame["type"] == "fault":
            sys.exit(f"{frame['code']}: {frame['message']}")
        if frame["type"] == "generate.done":
            break
        print(frame["text"], end="", flush=True)
    print()
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
