"""The bytes of this version's messages, read by the version before; the other way stands in tests/schemas."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgpack
import pytest

from tests.upgrade.versions import HERE, Version

SCHEMAS = HERE.parent / "schemas"


@pytest.fixture(scope="module")
def golden() -> dict[str, str]:
    read: dict[str, str] = json.loads((SCHEMAS / "golden.json").read_text())
    return read


def understood_by(version: Version, golden: dict[str, str], folder: Path) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(HERE / "decode_golden.py")],
        input=json.dumps(golden),
        env=version.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    read: dict[str, str] = json.loads(done.stdout)
    return read


def is_part_of(part: Any, whole: Any) -> bool:
    """Whether `whole` is `part` with more fields in its maps."""
    if isinstance(part, dict) and isinstance(whole, dict):
        return all(key in whole and is_part_of(value, whole[key]) for key, value in part.items())
    if isinstance(part, list) and isinstance(whole, list):
        return len(part) == len(whole) and all(map(is_part_of, part, whole))
    return bool(part == whole)


def test_the_version_before_reads_this_version_s_messages_but_for_what_is_new(
    version_before: Version, golden: dict[str, str], tmp_path: Path
) -> None:
    before: dict[str, str] = json.loads((SCHEMAS / "golden_of_version_2.json").read_text())
    understood = understood_by(version_before, golden, tmp_path)
    assert set(understood) == set(before) & set(golden)
    for tag, payload in understood.items():
        assert ":" not in payload, f"{tag}: {payload}"
        assert is_part_of(msgpack.unpackb(bytes.fromhex(payload)), msgpack.unpackb(bytes.fromhex(golden[tag])))


def test_the_version_before_ignores_fields_that_it_does_not_know(
    version_before: Version, golden: dict[str, str], tmp_path: Path
) -> None:
    extended = {
        tag: msgpack.packb({**msgpack.unpackb(bytes.fromhex(payload)), "added_later": {"to": ["all"]}}).hex()
        for tag, payload in golden.items()
    }
    assert understood_by(version_before, extended, tmp_path) == understood_by(version_before, golden, tmp_path)


def test_the_version_before_refuses_a_worker_id_with_a_dot(
    version_before: Version, golden: dict[str, str], tmp_path: Path
) -> None:
    grant = msgpack.unpackb(bytes.fromhex(golden["operation.grant"]))
    dotted = {"operation.grant": msgpack.packb({**grant, "worker_id": "decode.ab12cd"}).hex()}
    assert "worker_id" in understood_by(version_before, dotted, tmp_path)["operation.grant"]


def test_the_golden_bytes_of_the_version_before_are_what_it_writes(version_before: Version, tmp_path: Path) -> None:
    before: dict[str, str] = json.loads((SCHEMAS / "golden_of_version_2.json").read_text())
    assert understood_by(version_before, before, tmp_path) == before
