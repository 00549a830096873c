"""The `nixlbus` command line: which subcommands there are, and what an error looks like.

Each subcommand is a module of its own that is imported when it runs, so that `nixlbus --help` needs neither torch nor
nixl. A command that fails prints one line (one JSON object with `--json`) and exits with status 1.
"""

import asyncio
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="nixlbus",
    help="Messages over NATS, tensors over NIXL, one trace.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
NatsUrl = Annotated[str | None, typer.Option("--nats", help="NATS server. [default: $NIXLBUS_NATS_URL or loopback]")]
Model = Annotated[str | None, typer.Option("--model", help="Folder of a checkpoint. [default: the packaged digits]")]
Graph = Annotated[str | None, typer.Option("--graph", help="Name of the graph. [default: vlm]")]
Images = Annotated[list[Path] | None, typer.Option("--image", help="An image file; may be given several times.")]
MaxTokens = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of the answer.")]


@app.command()
def demo(
    image: Images = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask.")] = None,
    max_tokens: MaxTokens = 64,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Start a graph of five processes, ask it about a picture, draw the trace, stop it."""
    from workers.cli import demo as command

    _run(command.run(image, prompt, max_tokens, model, as_json), as_json)


@app.command()
def up(
    nats_port: Annotated[int, typer.Option("--nats-port", help="Port of the nats-server; 0 takes a free one.")] = 4222,
    http_port: Annotated[int | None, typer.Option("--http-port", help="Port of the frontend. [default: 8000]")] = None,
    otlp_port: Annotated[
        int | None, typer.Option("--otlp-port", help="Port of the trace store. [default: 4317]")
    ] = None,
    model: Model = None,
    as_json: AsJson = False,
) -> None:
    """Start nats-server and all roles on this machine and stay up until Ctrl-C."""
    from workers.cli import up as command

    _run(command.run(nats_port, http_port, otlp_port, model, as_json), as_json)


@app.command()
def worker(
    role: Annotated[str, typer.Argument(help="frontend, processor, decode, prefill, encode or traces.")],
    nats: NatsUrl = None,
    worker_id: Annotated[
        str | None, typer.Option("--id", help="Worker id. [default: the role and random digits]")
    ] = None,
    model: Model = None,
    graph: Graph = None,
    as_json: AsJson = False,
) -> None:
    """Run one worker of a graph in this process, until SIGTERM or Ctrl-C."""
    from workers.cli import worker as command

    _run(command.run(role, nats, worker_id, model, graph, as_json), as_json)


@app.command()
def run(
    target: Annotated[
        str, typer.Argument(help="A worker's class, module:Class or file.py:Class, from the current folder.")
    ],
    nats: NatsUrl = None,
    worker_id: Annotated[
        str | None, typer.Option("--id", help="Worker id. [default: the role and random digits]")
    ] = None,
    group: Annotated[str | None, typer.Option("--group", help="Group of its subjects. [default: the class's]")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a worker of your own in this process, until SIGTERM or Ctrl-C."""
    from workers.cli import run as command

    _run(command.run(target, nats, worker_id, group, as_json), as_json)


@app.command()
def server(
    port: Annotated[
        int | None,
        typer.Option("--port", help="Port of the nats-server; 0: a free one. [default: $NIXLBUS_NATS_URL's or 4222]"),
    ] = None,
    otlp_port: Annotated[
        int | None, typer.Option("--otlp-port", help="Port of the trace store. [default: 4317]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a nats-server with JetStream and a trace store until Ctrl-C, to develop against."""
    from workers.cli import server as command

    _run(command.run(port, otlp_port, as_json), as_json)


@app.command()
def request(
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask.")],
    image: Images = None,
    max_tokens: MaxTokens = 64,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds for the whole answer.")] = 60.0,
    nats: NatsUrl = None,
    graph: Graph = None,
    as_json: AsJson = False,
) -> None:
    """Publish a request to a graph's subject and stream the answer."""
    from workers.cli import request as command

    _run(command.run(prompt, image, max_tokens, timeout_s, nats, graph, as_json), as_json)


@app.command()
def ps(
    nats: NatsUrl = None,
    worker_id: Annotated[str | None, typer.Option("--id", help="This worker alone; exit status 1 if not live.")] = None,
    endpoints: Annotated[bool, typer.Option("--endpoints", help="A line for each endpoint.")] = False,
    as_json: AsJson = False,
) -> None:
    """List the live workers, by NATS service discovery."""
    from workers.cli import ps as command

    _run(command.run(nats, worker_id, endpoints, as_json), as_json)


@app.command()
def asyncapi(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Workers' classes, module:Class or file.py:Class. [default: the packaged graph]"),
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Describe the live workers instead.")] = False,
    nats: NatsUrl = None,
    graph: Annotated[
        str | None,
        typer.Option("--graph", help="Name of the graph, or group of the classes. [default: vlm, or theirs]"),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write to this file. [default: stdout]")] = None,
) -> None:
    """Write an AsyncAPI 3.0 document (JSON) of every subject."""
    from workers.cli import asyncapi as command

    if live and (targets or graph):
        raise typer.BadParameter("--live describes whatever is live: it takes neither classes nor --graph")
    _run(command.run(targets, live, nats, graph, out), as_json=False)


@app.command()
def trace(
    trace_id: Annotated[str, typer.Argument(help="Trace id, 32 hex digits; without it the last trace.")] = "",
    last: Annotated[bool, typer.Option("--last", help="The last trace that ended.")] = False,
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Draw the waterfall of a request, from the bus's trace store."""
    from workers.cli import trace as command

    _run(command.run("" if last else trace_id, nats, as_json), as_json)


@app.command()
def perf(
    initiator: Annotated[str, typer.Argument(help="Id of the worker that writes or reads; see 'nixlbus ps'.")],
    target: Annotated[str, typer.Argument(help="Id of the worker whose memory it is.")],
    kind: Annotated[str, typer.Option("--kind", help="write or read.")] = "write",
    sizes: Annotated[
        str, typer.Option("--sizes", help="Bytes of an operation, with commas.")
    ] = "1K,16K,256K,1M,4M,16M",
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, max=10_000, help="Measured operations of each size.")
    ] = 100,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=0.001, max=600.0, help="Seconds for all of them; then fewer are measured.")
    ] = 60.0,
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Measure latency and bandwidth by size between two live workers, and tell the transport."""
    from workers.cli import perf as command

    _run(command.run((initiator, target), kind, sizes, repetitions, timeout_s, nats, as_json), as_json)


@app.command()
def doctor(nats: NatsUrl = None, as_json: AsJson = False) -> None:
    """Tell what this machine has, what it lacks and what that costs."""
    from workers.cli import doctor as command

    _run(command.run(nats, as_json), as_json)


@app.command("nats-conf")
def nats_conf(
    out: Annotated[Path, typer.Option("--out", help="Folder for the configuration and a folder of keys per user.")],
    roles: Annotated[
        Path | None, typer.Option("--roles", help="TOML file of roles. [default: those of the vlm graph]")
    ] = None,
    keys_per_instance: Annotated[
        list[str] | None,
        typer.Option("--keys-per-instance", help="role=N: N keys, for workers role.1 to role.N; may be repeated."),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address that the server listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="Port that the server listens on.")] = 4222,
    monitoring_host: Annotated[
        str, typer.Option("--monitoring-host", help="Address of its monitoring, which asks nobody who he is.")
    ] = "127.0.0.1",
    monitoring_port: Annotated[int, typer.Option("--monitoring-port", help="Port of its monitoring.")] = 8222,
    store_dir: Annotated[str, typer.Option("--store-dir", help="JetStream's folder on the server.")] = "/data",
    tls_cert: Annotated[str | None, typer.Option("--tls-cert", help="The server's certificate, a path there.")] = None,
    tls_key: Annotated[str | None, typer.Option("--tls-key", help="Its private key, a path on the server.")] = None,
    tls_ca: Annotated[
        str | None, typer.Option("--tls-ca", help="Demand clients' certificates of this authority; a path there.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a nats-server configuration with a user for each role, and their keys."""
    from bus import ServerSettings
    from workers.cli import nats_conf as command

    server = ServerSettings(
        host=host,
        port=port,
        monitoring_host=monitoring_host,
        monitoring_port=monitoring_port,
        store_dir=store_dir,
    )
    tls = (tls_cert, tls_key, tls_ca)
    _run(command.run(out, roles, keys_per_instance or [], server, tls, as_json), as_json)


@app.command()
def streams(
    roles: Annotated[Path, typer.Option("--roles", help="TOML file of roles, as for nats-conf.")],
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Make the streams and consumers of durable queues, so that workers need no right to."""
    from workers.cli import streams as command

    _run(command.run(roles, nats, as_json), as_json)


dlq_app = typer.Typer(help="Dead letters: jobs that were given up.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(dlq_app, name="dlq")

DeadLetterNumbers = Annotated[list[int] | None, typer.Argument(min=1, help="Numbers; see 'nixlbus dlq ls'.")]
Every = Annotated[bool, typer.Option("--all", help="Every dead letter (of --queue).")]
QueueName = Annotated[str, typer.Option("--queue", help="QUEUE or GRAPH.QUEUE. [default: all]")]
Limit = Annotated[int, typer.Option("--limit", min=1, max=10_000, help="Most dead letters, the oldest first.")]


@dlq_app.command("ls")
def dlq_ls(queue: QueueName = "", limit: Limit = 100, nats: NatsUrl = None, as_json: AsJson = False) -> None:
    """List dead letters, the oldest first."""
    from workers.cli import dlq as command

    _run(command.list_letters(nats, queue, limit, as_json), as_json)


@dlq_app.command("show")
def dlq_show(
    number: Annotated[int, typer.Argument(min=1, help="Number of a dead letter.")],
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Print one dead letter: the reason, its headers, its payload."""
    from workers.cli import dlq as command

    _run(command.show(nats, number, as_json), as_json)


@dlq_app.command("replay")
def dlq_replay(
    numbers: DeadLetterNumbers = None,
    every: Every = False,
    queue: QueueName = "",
    limit: Limit = 10_000,
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Put dead letters back into their queues, where they begin anew."""
    from workers.cli import dlq as command

    _run(command.settle("replay", nats, numbers, every, queue, limit, as_json), as_json)


@dlq_app.command("drop")
def dlq_drop(
    numbers: DeadLetterNumbers = None,
    every: Every = False,
    queue: QueueName = "",
    limit: Limit = 10_000,
    nats: NatsUrl = None,
    as_json: AsJson = False,
) -> None:
    """Take dead letters out for good."""
    from workers.cli import dlq as command

    _run(command.settle("drop", nats, numbers, every, queue, limit, as_json), as_json)


def main() -> None:
    """Entry point of the console script."""
    app()


def _run(command: Coroutine[Any, Any, int], as_json: bool) -> None:
    import uvloop

    from bus import ServerUnavailable
    from workers.cli.output import Output
    from workers.launcher import WorkerFailed
    from workers.process import START_ERRORS
    from workers.target import UnknownTarget

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            sys.exit(runner.run(command))
    except KeyboardInterrupt:
        sys.exit(130)
    except (*START_ERRORS, ServerUnavailable, UnknownTarget, WorkerFailed, TimeoutError) as error:
        Output(as_json).error(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
