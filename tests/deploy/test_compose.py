"""What the compose files promise, read from the files as they stand: the claims of deploy/README.md."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from bus.control_plane.server_files import NKEY_FILE, SHARED_KEY_FILE
from schemas.traces import TRACE_STORE_ID
from workers.roles import GRAPH_ROLES
from workers.roles.access import vlm_roles
from workers.worker import DRAIN_TIMEOUT_S

ROOT = Path(__file__).parent.parent.parent
COMPOSE_FILES = ("docker-compose.yml", "deploy/compose.receiver.yml", "deploy/compose.shared-memory.yml")
TOP_LEVEL_KEYS = {"services", "volumes"}
SERVICE_KEYS = {
    "build",
    "cap_add",
    "cap_drop",
    "command",
    "depends_on",
    "entrypoint",
    "environment",
    "healthcheck",
    "image",
    "init",
    "ipc",
    "pid",
    "ports",
    "read_only",
    "restart",
    "security_opt",
    "stop_grace_period",
    "tmpfs",
    "volumes",
}
HEALTHCHECK_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
"""With the two sets above: what docker-compose 1.29.2 was seen to accept and the Compose specification has."""


def composed(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


def services(name: str = "docker-compose.yml") -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = composed(name)["services"]
    return found


def seconds(duration: str) -> float:
    amount, unit = re.fullmatch(r"(\d+)(s|m)", duration).groups()  # type: ignore[union-attr]
    return float(amount) * {"s": 1, "m": 60}[unit]


def dockerfile(instruction: str) -> list[str]:
    return re.findall(rf"^{instruction} (.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_the_files_use_no_key_that_an_older_compose_rejects(name: str) -> None:
    assert {key for key in composed(name) if not key.startswith("x-")} <= TOP_LEVEL_KEYS
    for service, definition in services(name).items():
        assert set(definition) <= SERVICE_KEYS, service
        assert set(definition.get("healthcheck", {})) <= HEALTHCHECK_KEYS, service
        for condition in definition.get("depends_on", {}).values():
            assert set(condition) == {"condition"}, service


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_every_port_is_published_on_loopback_alone(name: str) -> None:
    for service, definition in services(name).items():
        for port in definition.get("ports", []):
            assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), f"{service}: {port}"


def test_the_ports_are_those_of_nats_the_frontend_and_jaeger() -> None:
    published = {port.split(":")[1] for definition in services().values() for port in definition.get("ports", [])}
    assert published == {"4222", "8000", "16686"}


@pytest.mark.parametrize("name", COMPOSE_FILES)
def test_every_image_is_pinned_and_ours_is_built_here(name: str) -> None:
    for service, definition in services(name).items():
        if "image" in definition:
            assert re.fullmatch(r"nixlbus:local|[a-z/]+:\d+\.\d+[a-z0-9.-]*", definition["image"]), service
    built = {service for service, definition in services().items() if "build" in definition}
    assert built == {"init"}
    assert services()["init"]["image"] == "nixlbus:local"


@pytest.mark.parametrize("role", GRAPH_ROLES)
def test_a_role_waits_for_nats_and_is_checked_in_discovery_under_its_own_name(role: str) -> None:
    service = services()[role]
    assert service["environment"]["NIXLBUS_IDENTITY"] == role
    name = '--id "$$NIXLBUS_IDENTITY.$$(hostname)"'
    assert name in service["command"][-1]
    assert service["healthcheck"]["test"] == ["CMD-SHELL", f"nixlbus ps {name}"]
    assert service["depends_on"] == {
        "init": {"condition": "service_completed_successfully"},
        "nats": {"condition": "service_healthy"},
    }
    assert service["restart"] == "unless-stopped"


@pytest.mark.parametrize("role", GRAPH_ROLES)
def test_a_role_has_longer_than_its_drain_to_end(role: str) -> None:
    assert seconds(services()[role]["stop_grace_period"]) >= 2 * DRAIN_TIMEOUT_S


@pytest.mark.parametrize("role", GRAPH_ROLES)
def test_a_role_sends_its_spans_to_jaeger_and_reads_its_own_keys_and_no_other(role: str) -> None:
    environment = services()[role]["environment"]
    assert environment["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://jaeger:4317"
    assert environment["NIXLBUS_NATS_NKEY"] == f"/etc/nixlbus/{NKEY_FILE}"
    shared = f"/etc/nixlbus/{SHARED_KEY_FILE}" if vlm_roles().moves_tensors(role) else None
    assert environment.get("NIXLBUS_KEY_FILE") == shared
    assert services()[role]["volumes"] == [f"{role}-keys:/etc/nixlbus:ro"]


def test_init_writes_each_role_s_keys_into_the_volume_that_the_role_mounts() -> None:
    mounted = dict(reversed(volume.split(":")) for volume in services()["init"]["volumes"])
    roles = [*GRAPH_ROLES, "traces"]
    assert mounted == {
        "/etc/nixlbus": "credentials",
        "/etc/nixlbus/server": "nats-config",
        **{f"/etc/nixlbus/{role}": f"{role}-keys" for role in roles},
    }
    folders = (ROOT / "Dockerfile").read_text()
    assert f"-m 0700 {' '.join(roles)} " in folders
    assert set(vlm_roles().roles) == {*roles, "client", "operator", "observer"}


@pytest.mark.parametrize("service", ["init", "nats", *GRAPH_ROLES])
def test_a_container_has_no_capability_and_no_writable_root(service: str) -> None:
    definition = services()[service]
    assert definition["cap_drop"] == ["ALL"]
    assert definition["read_only"] is True
    assert "no-new-privileges:true" in definition["security_opt"]


def test_init_alone_writes_the_configuration_and_nats_keeps_its_streams() -> None:
    mounts = {service: definition.get("volumes", []) for service, definition in services().items()}
    writers = [s for s, volumes in mounts.items() for v in volumes if not v.endswith(":ro") and "/etc/nixlbus" in v]
    assert set(writers) == {"init"}
    assert mounts["nats"] == ["nats-config:/etc/nixlbus:ro", "nats-data:/data"]
    command = services()["init"]["command"]
    assert command[command.index("--store-dir") + 1] == "/data"
    assert services()["nats"]["entrypoint"][-1] == "/etc/nixlbus/nats-server.conf"
    used = {volume.split(":")[0] for volumes in mounts.values() for volume in volumes}
    assert set(composed("docker-compose.yml")["volumes"]) == used


def test_the_receiver_takes_jaeger_s_place() -> None:
    ((name, definition),) = services("deploy/compose.receiver.yml").items()
    assert name == "jaeger"
    assert definition["image"] == "nixlbus:local"
    assert definition["command"] == ["nixlbus", "worker", "traces"]
    assert definition["environment"]["NIXLBUS_OTLP_HOST"] == "0.0.0.0"
    assert definition["environment"]["NIXLBUS_IDENTITY"] == "traces"
    assert definition["volumes"] == ["traces-keys:/etc/nixlbus:ro"]
    assert definition["healthcheck"]["test"] == ["CMD", "nixlbus", "ps", "--id", TRACE_STORE_ID]
    assert seconds(definition["stop_grace_period"]) >= 2 * DRAIN_TIMEOUT_S


def test_the_roles_that_move_tensors_share_what_cma_needs() -> None:
    sharing = services("deploy/compose.shared-memory.yml")
    assert set(sharing) == {"decode", "prefill", "encode"}
    assert all(definition["cap_add"] == ["SYS_PTRACE"] for definition in sharing.values())
    assert sharing["decode"]["ipc"] == "shareable"
    assert all(sharing[role][kind] == "service:decode" for role in ("prefill", "encode") for kind in ("pid", "ipc"))


def test_the_image_runs_as_a_user_of_its_own() -> None:
    (user,) = dockerfile("USER")
    uid, gid = (int(part) for part in user.split(":"))
    assert uid > 0
    assert gid > 0


def test_the_image_installs_pinned_dependencies_before_the_code() -> None:
    text = (ROOT / "Dockerfile").read_text()
    installs = dockerfile("RUN python -m pip install")
    assert len(installs) == 2
    assert all("-c " in install and "${PIP_ARGS}" in install for install in installs)
    assert text.index("-r /tmp/requirements.txt") < text.index("COPY bus ")
    assert "optional-dependencies']['http']" in text
    assert "embedded" not in text


def test_the_build_sees_the_packages_and_no_checkout_state() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = {
        source for copy in dockerfile("COPY") for source in copy.split()[:-1] if not source.startswith(("-", "/"))
    }
    assert copied == kept
