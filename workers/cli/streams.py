"""`nixlbus streams`: makes what the durable queues and large messages of a roles file need in JetStream.

In: the roles file that `nixlbus nats-conf` was given, and the key of `provisioner`. Out: streams and consumers; what is
there stays as it is.
"""

from pathlib import Path

from bus import JobQueueConfig, load_roles
from schemas.message import Message
from workers.cli.client import open_client
from workers.cli.output import Output


async def run(roles_file: Path, nats: str | None, as_json: bool) -> int:
    """Make them; returns the exit status. Raises `RolesFileError`, `DurableWorkUnavailable` and of the connection."""
    output = Output(as_json)
    roles = load_roles(roles_file)
    queues = [JobQueueConfig(graph=roles.graph, queue=queue, message_type=Message) for queue in roles.queues]
    async with open_client("provisioner", nats) as bus:
        names = await bus.provision(queues, media=roles.keeps_media)
    output.result({"names": names})
    output.text(f"in JetStream: {', '.join(names)}" if names else "the file describes no queue and no media")
    return 0
