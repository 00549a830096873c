import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import Report


def test_a_report_holds_rows_checks_machine_and_versions(tmp_path: Path) -> None:
    report = Report("operations")
    report.row("write", "nixlbus", 4096, 1, [0.001, 0.003, 0.002], 0.006)
    assert report.value("write", "nixlbus", 4096, 1, "p50_us") == 2000
    report.check("lower", 1.3, 1.45, "lower")
    report.check("higher", 0.4, 0.5, "higher")
    report.write(tmp_path / "deep" / "report.json")
    whole = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert set(whole) == {"benchmark", "date", "machine", "versions", "rows", "checks"}
    assert [check["ok"] for check in whole["checks"]] == [True, False]
    assert whole["rows"][0]["per_s"] == 500


@pytest.mark.full
@pytest.mark.timeout(200)
def test_the_operations_benchmark_runs_and_checks_every_limit(tmp_path: Path) -> None:
    out = tmp_path / "operations.json"
    command = [sys.executable, "-m", "benchmarks.operations", "--quick", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    whole = json.loads(out.read_text())
    ours, floors = {"nixlbus", "nixlbus_open"}, {"raw_nats", "raw_nixl", "raw_nixl_huge", "memcpy"}
    assert {row["system"] for row in whole["rows"]} == ours | floors
    assert len(whole["checks"]) == 16


@pytest.mark.full
@pytest.mark.timeout(200)
def test_the_bus_benchmark_runs_and_checks_every_limit(tmp_path: Path) -> None:
    out = tmp_path / "bus.json"
    command = [sys.executable, "-m", "benchmarks.bus", "--quick", "--json", str(out)]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    whole = json.loads(out.read_text())
    assert {(row["case"], row["system"]) for row in whole["rows"]} == {
        ("request", "raw_nats"),
        ("request", "raw_nats_typed"),
        ("request", "nats_micro"),
        ("request", "nixlbus"),
        ("request", "nixlbus_sampled_out"),
        ("request", "nixlbus_traced"),
        ("job", "raw_jetstream"),
        ("job", "nixlbus"),
        ("job", "nixlbus_idempotent"),
    }
    assert {check["name"] for check in whole["checks"]} == {
        "request_p50_vs_raw_nats",
        "request_32_at_once_vs_raw_nats",
        "jobs_vs_raw_jetstream_fetch_32",
        "jobs_without_claims_vs_raw_jetstream_fetch_32",
        "sampled_out_cpu_us_per_hop_1_at_once",
        "sampled_out_cpu_us_per_hop_32_at_once",
        "traced_cpu_us_per_hop_1_at_once",
        "traced_cpu_us_per_hop_32_at_once",
        "spans_lost_while_measuring",
        "spans_lost_of_a_burst_of_20000",
    }
    lost = {check["name"]: check["value"] for check in whole["checks"] if check["name"].startswith("spans_lost")}
    assert set(lost.values()) == {0}
