"""docs/security.md: its table of permissions is what the code grants, its roles file and its commands are good."""

import re
import subprocess
from pathlib import Path

import pytest

from bus import load_roles
from bus.control_plane.permissions import DISCOVERY, permissions
from tests.docs.code_spans import table_rows
from tests.graph_fixture import environment
from workers.roles.access import vlm_roles

PAGE = (Path(__file__).parents[2] / "docs" / "security.md").read_text()


def shown(subjects: list[str], user: str) -> str:
    """Subjects as the page has them: the prefix left out, discovery in one word, inboxes told above the table."""
    short = []
    for subject in subjects:
        name, _, queue_group = subject.removeprefix("nixlbus.v1.").partition(" ")
        if name in DISCOVERY:
            name = "$SRV"
        if name not in (f"_INBOX.{user}.>", "_INBOX.>"):
            short.append(f"`{name}` [{queue_group}]" if queue_group else f"`{name}`")
    return ", ".join(dict.fromkeys(short))


def test_the_table_of_permissions_is_what_is_granted() -> None:
    roles = vlm_roles()
    granted = {name: permissions(roles, name) for name in roles.roles}
    wanted = [
        f"| `{name}` | {shown(rights.publish, name)} | {shown(rights.subscribe, name)} |"
        for name, rights in granted.items()
    ]
    (table,) = re.findall(r"^\| user \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", PAGE, re.MULTILINE)
    assert table.splitlines() == wanted, "\n" + "\n".join(wanted)


def test_the_roles_file_of_the_page_is_one(tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    path = tmp_path / "roles.toml"
    path.write_text(text)
    roles = load_roles(path)
    ours = {"api", "resize", "store", "reports", "traces", "website"}
    assert set(roles.roles) == ours | {"operator", "observer", "provisioner"}
    assert "nixlbus.v1.worker.traces.trace" in permissions(roles, "operator").publish
    assert "$JS.API.STREAM.CREATE.NIXLBUS_JOBS" in permissions(roles, "provisioner").publish
    assert not any(
        ".CREATE." in s for name in set(roles.roles) - {"provisioner"} for s in permissions(roles, name).publish
    )
    assert "nixlbus.v1.graph.vlm.generate" in permissions(roles, "api").publish
    assert permissions(roles, "website").subscribe == ["_INBOX.website.>"]
    assert "nixlbus.v1.worker.store.*.reserve" in permissions(roles, "resize").publish


def test_the_commands_of_the_page_make_an_authority_that_verifies(tmp_path: Path) -> None:
    (commands,) = re.findall(r"^```sh\n(openssl.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    made = subprocess.run(
        ["sh", "-ec", f"{commands}\nopenssl verify -CAfile ca.pem nats.pem"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip
    if made.returncode == 127:
        pytest.fail("openssl is not installed")
    assert "nats.pem: OK" in made.stdout, made.stderr


def test_every_variable_on_the_page_is_one_of_ours() -> None:
    source = "".join(path.read_text() for path in (Path(__file__).parents[2] / "bus").glob("*.py"))
    variables = set(re.findall(r"NIXLBUS_[A-Z]\w+", PAGE)) - {"NIXLBUS_DLQ"}
    assert {name for name in variables if name not in source} == set()
    assert table_rows(PAGE, "file")
