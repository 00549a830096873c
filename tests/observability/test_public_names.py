"""What the package offers, and what importing it costs."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import observability


def test_all_is_exactly_what_is_public() -> None:
    tree = ast.parse(Path(str(observability.__file__)).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("observability.")
        for alias in node.names
    }
    assert set(observability.__all__) == imported
    assert len(observability.__all__) == len(set(observability.__all__))
    for name in observability.__all__:
        assert not name.startswith("_")
        assert getattr(observability, name).__module__.startswith("observability") or name in (
            "AttributeValue",
            "Attributes",
        )


def test_functions_are_not_shadowed_by_submodules() -> None:
    names = {path.stem for path in Path(str(observability.__file__)).parent.glob("*.py")}
    assert not names & set(observability.__all__)


def test_importing_it_imports_neither_grpc_nor_rich_nor_the_sdk() -> None:
    program = (
        "import json, sys, observability as o\n"
        "with o.span('off'): o.inject({})\n"
        "o.configure('off', instance_id='1', service_version='1')\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={})
    loaded = set(json.loads(ended.stdout))
    assert not loaded & {"grpc", "rich", "google.protobuf", "opentelemetry.sdk", "torch", "nats", "nixl"}
