"""`nixlbus ps --id` as a health check."""

from tests.graph_fixture import RunningGraph, json_of, run_cli


def test_ps_of_a_live_worker_lists_it_alone(graph: RunningGraph) -> None:
    everyone = json_of(run_cli("ps", "--nats", graph.nats_url, "--json"))["workers"]
    assert len(everyone) > 1
    finished = run_cli("ps", "--id", everyone[0]["id"], "--nats", graph.nats_url, "--json")
    assert finished.returncode == 0, finished.stderr
    assert [worker["id"] for worker in json_of(finished)["workers"]] == [everyone[0]["id"]]


def test_ps_of_a_worker_that_does_not_answer_fails_and_names_it(graph: RunningGraph) -> None:
    finished = run_cli("ps", "--id", "decode-gone", "--nats", graph.nats_url)
    assert finished.returncode == 1
    assert "decode-gone does not answer" in finished.stderr
    assert finished.stdout == ""
