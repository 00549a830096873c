import json

import pytest

from tests.graph_fixture import SAMPLES, RunningGraph, json_of, run_cli
from workers.roles import GRAPH_ROLES


def ask(graph: RunningGraph, *options: str) -> list[str]:
    image = str(SAMPLES / "digit-7.png")
    return ["request", "--nats", graph.nats_url, "--image", image, "--prompt", "What digit is this?", *options]


def test_request_streams_the_answer_and_trace_draws_it(graph: RunningGraph) -> None:
    answer = json_of(run_cli(*ask(graph, "--json")))
    assert "7" in answer["text"]
    drawn = run_cli("trace", answer["trace_id"], "--nats", graph.nats_url)
    assert drawn.returncode == 0, drawn.stderr
    assert "model.decode" in drawn.stdout
    assert drawn.stdout.count("nixl.write") >= 2
    as_json = json_of(run_cli("trace", answer["trace_id"], "--nats", graph.nats_url, "--json"))
    assert as_json["trace_id"] == answer["trace_id"]
    assert {span["service"] for span in as_json["spans"]} == {"processor", "decode", "prefill", "encode"}


def test_request_for_people_prints_the_answer_and_the_ledger(graph: RunningGraph) -> None:
    finished = run_cli(*ask(graph))
    assert finished.returncode == 0, finished.stderr
    assert "7" in finished.stdout.splitlines()[0]
    assert "kv prefill->decode" in finished.stdout


def test_ps_lists_every_role_of_the_graph(graph: RunningGraph) -> None:
    workers = json_of(run_cli("ps", "--nats", graph.nats_url, "--json"))["workers"]
    assert {worker["metadata"]["role"] for worker in workers} >= set(GRAPH_ROLES)
    assert all(endpoint["num_requests"] >= 0 for worker in workers for endpoint in worker["endpoints"])
    table = run_cli("ps", "--nats", graph.nats_url).stdout
    assert all(role in table for role in GRAPH_ROLES)


def test_an_unknown_trace_is_not_found(graph: RunningGraph) -> None:
    finished = run_cli("trace", "0" * 31 + "1", "--nats", graph.nats_url, "--json")
    assert finished.returncode == 1
    assert json_of(finished)["error"]["code"] == "not_found"


@pytest.mark.parametrize("command", [["request", "--prompt", "hi"], ["ps"], ["trace"]])
def test_without_a_server_a_command_fails_within_seconds_and_says_what_to_do(command: list[str]) -> None:
    finished = run_cli(*command, "--nats", "nats://127.0.0.1:1", "--json", timeout_s=15)
    assert finished.returncode == 1
    error = json_of(finished)["error"]
    assert error["code"] == "connection_lost"
    assert "nats-server" in error["remedy"]


def test_doctor_tries_nixl_and_tells_what_is_missing(graph: RunningGraph) -> None:
    finished = run_cli("doctor", "--nats", graph.nats_url, "--json")
    assert finished.returncode == 0, finished.stderr
    checks = {check["name"]: check for check in json_of(finished)["checks"]}
    assert checks["nixl transfer"]["found"]
    assert "tcp" in checks["ucx transports"]["value"]
    assert checks["nats"]["found"]
    assert all(check["cost"] for check in checks.values() if not check["found"])


def test_doctor_fails_where_nixl_can_not_move_a_byte(graph: RunningGraph) -> None:
    finished = run_cli("doctor", "--nats", graph.nats_url, "--json", UCX_TLS="nothing")
    assert finished.returncode == 1
    assert "nixl transfer" in json_of(finished)["missing"]


def test_a_worker_that_needs_a_key_says_how_to_make_one(graph: RunningGraph) -> None:
    finished = run_cli("worker", "encode", "--nats", graph.nats_url, "--json")
    assert finished.returncode == 1
    last = json.loads(finished.stdout.splitlines()[-1])
    assert last["step"] == "failed"
    assert "nixlbus nats-conf" in last["detail"]


def test_an_unknown_role_names_those_there_are() -> None:
    finished = run_cli("worker", "oracle")
    assert finished.returncode == 2
    assert "prefill" in finished.stderr


def test_a_bad_variable_is_named(graph: RunningGraph) -> None:
    finished = run_cli("ps", "--nats", graph.nats_url, NIXLBUS_ARENA_MB="plenty")
    assert finished.returncode == 1
    assert "NIXLBUS_ARENA_MB='plenty'" in finished.stderr
