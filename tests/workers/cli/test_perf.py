import pytest
import typer

from tests.graph_fixture import RunningGraph, json_of, run_cli
from workers.cli.perf import parsed_sizes, size_text


def ids_by_role(graph: RunningGraph) -> dict[str, str]:
    workers = json_of(run_cli("ps", "--nats", graph.nats_url, "--json"))["workers"]
    return {worker["metadata"]["role"]: worker["id"] for worker in workers}


@pytest.mark.parametrize("kind", ["write", "read"])
def test_two_live_workers_are_measured_by_size_and_the_transport_is_named(graph: RunningGraph, kind: str) -> None:
    ids = ids_by_role(graph)
    options = ["--kind", kind, "--sizes", "1K,3000,2M", "--repetitions", "7", "--nats", graph.nats_url, "--json"]
    finished = run_cli("perf", ids["prefill"], ids["decode"], *options)
    assert finished.returncode == 0, finished.stderr + finished.stdout
    assert finished.stdout.count("\n") == 1
    result = json_of(finished)
    assert (result["initiator"], result["target"], result["kind"]) == (ids["prefill"], ids["decode"], kind)
    rows = [(row["size_bytes"], row["num_operations"], row["num_bytes"]) for row in result["rows"]]
    assert rows == [(size, 7, 7 * size) for size in (1024, 3000, 2 << 20)]
    assert result["skipped"] == []
    assert result["backend"] == "UCX"
    assert result["lanes"].startswith("intra-node "), result["lanes_reason"]
    assert any(transport in result["lanes"] for transport in ("cma", "tcp", "posix", "sysv"))


def test_for_people_there_is_a_table_and_what_was_skipped(graph: RunningGraph) -> None:
    ids = ids_by_role(graph)
    options = ["--sizes", "64K,1G", "--repetitions", "2", "--nats", graph.nats_url]
    finished = run_cli("perf", ids["encode"], ids["prefill"], *options)
    assert finished.returncode == 0, finished.stderr
    assert f"{ids['encode']} writes to {ids['prefill']}" in finished.stdout
    assert "UCX: intra-node" in finished.stdout
    assert "64 KiB" in finished.stdout
    assert f"1 GiB skipped: {ids['encode']}: no 1,073,741,824 bytes free" in finished.stdout


def test_a_missing_worker_is_named_at_once(graph: RunningGraph) -> None:
    ids = ids_by_role(graph)
    for pair in (("nobody", ids["decode"]), (ids["decode"], "nobody"), (ids["frontend"], ids["decode"])):
        finished = run_cli("perf", *pair, "--nats", graph.nats_url, "--json", timeout_s=15)
        assert finished.returncode == 1
        error = json_of(finished)["error"]
        assert error["code"] == "no_responders"
        assert "nixlbus ps" in error["remedy"]


def test_a_worker_is_not_measured_with_itself(graph: RunningGraph) -> None:
    decode = ids_by_role(graph)["decode"]
    finished = run_cli("perf", decode, decode, "--nats", graph.nats_url)
    assert finished.returncode == 1
    assert "itself" in finished.stderr
    assert finished.stderr.count("\n") == 1


def test_sizes_are_read_as_they_are_written() -> None:
    assert parsed_sizes("512, 1K,16KiB,4m,1G") == [512, 1024, 16384, 4 << 20, 1 << 30]
    assert [size_text(size) for size in (512, 1536, 16384, 4 << 20, 1 << 30)] == [
        "512 B",
        "1536 B",
        "16 KiB",
        "4 MiB",
        "1 GiB",
    ]


@pytest.mark.parametrize("text", ["", "0", "-1", "1T", "1.5M", "many", "1K,,2K", str(2**63), ",".join(["1"] * 33)])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parsed_sizes(text)
