"""What a bus proves itself with: nkeys, passwords, TLS, against real servers; and that no secret is ever shown."""

import asyncio
import base64
import json
import os
import secrets
import time
import traceback
from collections.abc import AsyncIterator
from pathlib import Path

import nkeys
import pytest
import trustme

from bus import Bus, BusConfig, ConfigError, ConnectionLost, EmbeddedServer, PermissionDenied, TlsFiles, embedded_server
from bus.control_plane.credentials import connect_options
from bus.control_plane.nats_url import redacted
from tests.bus.control_plane.guarded_server import guarded_server

PROMPTLY_S = 20.0
PASSWORD = "hunter2swordfish"
REFUSED = r"Authorization Violation|reset by peer|closed"
"""What the last try met: the server's word, or the end of the connection, which may come first."""


def seed_file(path: Path) -> Path:
    path.write_bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    path.chmod(0o600)
    return path


def config(**fields: str) -> BusConfig:
    return BusConfig(worker_id="w", connect_timeout_s=1.0, **fields)  # type: ignore[arg-type]


async def opened(configuration: BusConfig) -> bool:
    async with Bus.open(configuration, data_plane=False) as bus:
        return bus.is_ready


@pytest.fixture
async def locked(tmp_path: Path) -> AsyncIterator[EmbeddedServer]:
    path = tmp_path / "server.conf"
    path.write_text(
        f'listen: "127.0.0.1:-1"\nhttp: "127.0.0.1:-1"\nauthorization {{ user: "someone", password: "{PASSWORD}" }}\n'
    )
    async with embedded_server(configuration=path) as server:
        yield server


async def test_a_user_and_password_in_the_url_are_used_and_not_shown(locked: EmbeddedServer) -> None:
    address = locked.url.removeprefix("nats://")
    right = config(nats_url=f"nats://someone:{PASSWORD}@{address}")
    assert await opened(right)
    assert PASSWORD not in repr(right)
    with pytest.raises(ConnectionLost, match=REFUSED) as caught:
        await opened(config(nats_url=f"nats://someone:{PASSWORD}x@{address}"))
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


async def test_nothing_that_a_wrong_seed_meets_shows_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with guarded_server(tmp_path) as guarded:
        stranger = seed_file(tmp_path / "stranger")
        with pytest.raises(ConnectionLost, match=REFUSED) as caught:
            await opened(config(nats_url=guarded.url, nats_nkey=str(stranger)))
        secret = stranger.read_text()
        assert secret not in "".join(traceback.format_exception(caught.value))
        assert secret not in caplog.text
        assert not [user for user in guarded.files.users if guarded.seed(user) in guarded.configuration()]


async def test_refused_credentials_are_told_at_once_and_by_their_variable(tmp_path: Path) -> None:
    async with guarded_server(tmp_path) as guarded:
        stranger = str(seed_file(tmp_path / "stranger"))
        for fields, remedy in (
            ({"nats_url": guarded.url, "nats_nkey": stranger}, "check NIXLBUS_NATS_NKEY"),
            ({"nats_url": guarded.url.replace("//", "//someone:else@")}, "check the user in NIXLBUS_NATS_URL"),
            ({"nats_url": guarded.url}, "none were given: set NIXLBUS_NATS_NKEY"),
        ):
            async with asyncio.timeout(PROMPTLY_S):
                with pytest.raises(ConnectionLost, match=f"refused these credentials: .*; {remedy}") as caught:
                    await opened(BusConfig(worker_id="w", connect_timeout_s=600, **fields))  # type: ignore[arg-type]
            assert "nats-server runs" not in str(caught.value)


async def test_refused_by_one_server_another_is_still_tried(tmp_path: Path) -> None:
    async with guarded_server(tmp_path) as guarded, embedded_server() as open_server:
        for _ in range(12):  # the order is random
            assert await opened(config(nats_url=f"{guarded.url},{open_server.url}"))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
@pytest.mark.parametrize("field", ["nats_nkey", "nats_creds"])
def test_a_secret_that_others_may_read_is_refused_by_the_name_of_its_variable(
    tmp_path: Path, field: str, mode: int
) -> None:
    path = seed_file(tmp_path / "seed")
    path.chmod(mode)
    with pytest.raises(ConfigError, match="chmod 600") as caught:
        connect_options(config(**{field: str(path)}))
    assert caught.value.variable == f"NIXLBUS_{field.upper()}"
    assert path.read_text() not in str(caught.value)


def test_a_seed_file_that_holds_something_else_is_refused_and_not_quoted(tmp_path: Path) -> None:
    path = seed_file(tmp_path / "seed")
    seed = path.read_text()
    mistyped = seed[:-3] + ("A" if seed[-3] != "A" else "B") + seed[-2:]
    account = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT).decode()
    for content in ("", "not a seed", mistyped, account, seed.lower(), "ü" * 58):
        path.write_text(content)
        with pytest.raises(ConfigError, match="NIXLBUS_NATS_NKEY") as caught:
            connect_options(config(nats_nkey=str(path)))
        assert not content or content not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigError, match="No such file"):
        connect_options(config(nats_nkey=str(tmp_path / "none")))


def test_settings_that_exclude_each_other_are_told(tmp_path: Path) -> None:
    path = str(seed_file(tmp_path / "seed"))
    for fields, why in (
        ({"nats_nkey": path, "nats_creds": path}, "choose one"),
        ({"nats_creds": path}, "credentials file"),
        ({"nats_ca": path}, "tls://"),
        ({"nats_ca": path, "nats_url": "tls://a"}, "certificates"),
        ({"nats_cert": path, "nats_url": "tls://a"}, "NIXLBUS_NATS_KEY"),
        ({"nats_key": path, "nats_url": "tls://a"}, "NIXLBUS_NATS_CERT"),
        ({"nats_cert": path, "nats_key": path, "nats_url": "tls://a"}, "belongs to"),
    ):
        with pytest.raises(ConfigError, match=why):
            connect_options(config(**fields))
    assert connect_options(config()) == {}


@pytest.mark.parametrize(
    "url",
    [f"nats://u:{PASSWORD}/x@h:1", f"http://u:{PASSWORD}@h", f"nats://u:a,{PASSWORD}@h:1", f"nats://u:{PASSWORD}@"],
)
def test_a_url_that_can_not_be_used_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="NIXLBUS_NATS_URL") as caught:
        config(nats_url=url)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("nats://h:1", "nats://h:1"),
        ("nats://u:p@h:1,tls://token@g", "nats://h:1,tls://g"),
        ("nats://u:p@ss@h", "nats://h"),
        ("u:p@h:1", "h:1"),
    ],
)
def test_a_url_is_shown_without_users(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_a_worker_with_credentials_has_its_role_as_the_first_part_of_its_id(tmp_path: Path) -> None:
    seed = str(seed_file(tmp_path / "seed"))
    assert BusConfig.from_env("encode", {}).worker_id.startswith("encode-")
    for environ in ({"NIXLBUS_NATS_NKEY": seed}, {"NIXLBUS_NATS_CREDS": seed}, {"NIXLBUS_NATS_URL": "nats://u:p@h"}):
        assert BusConfig.from_env("encode", environ).worker_id.startswith("encode.")
    environ = {"NIXLBUS_NATS_NKEY": seed, "NIXLBUS_IDENTITY": "encode"}
    assert BusConfig.from_env("operator", environ).worker_id.startswith("encode.")
    assert BusConfig.from_env("ps", {**environ, "NIXLBUS_IDENTITY": "encode.2"}).worker_id == "encode.2"
    assert BusConfig.from_env("ps", {**environ, "NIXLBUS_WORKER_ID": "mine"}).worker_id == "mine"


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def issued(folder: Path, authority: trustme.CA, name: str) -> tuple[str, str, str]:
    """Paths of the authority, a certificate for `name` and its key."""
    certificate = authority.issue_cert(name)
    ca, cert, key = (folder / f"{name}.{kind}" for kind in ("ca", "cert", "key"))
    authority.cert_pem.write_to_path(str(ca))
    certificate.cert_chain_pems[0].write_to_path(str(cert))
    certificate.private_key_pem.write_to_path(str(key))
    key.chmod(0o600)
    return str(ca), str(cert), str(key)


async def test_tls_connects_to_a_server_of_the_authority_and_to_no_other(tmp_path: Path, authority: trustme.CA) -> None:
    ca, cert, key = issued(tmp_path, authority, "127.0.0.1")
    other_ca, _, _ = issued(tmp_path, trustme.CA(), "localhost")
    async with guarded_server(tmp_path, tls=TlsFiles(cert=cert, key=key)) as guarded:
        port = guarded.url.rpartition(":")[2]
        trusted = BusConfig.from_env(
            "encode", {}, nats_url=f"tls://127.0.0.1:{port}", nats_nkey=guarded.files.users["encode"].nkey, nats_ca=ca
        )
        assert await opened(trusted)
        for wrong in ({"nats_ca": other_ca}, {}):
            with pytest.raises(ConnectionLost, match="certificate verify failed"):
                await opened(config(nats_url=f"tls://127.0.0.1:{port}", **wrong))


async def test_a_server_that_asks_for_certificates_takes_those_of_its_authority(
    tmp_path: Path, authority: trustme.CA
) -> None:
    ca, cert, key = issued(tmp_path, authority, "127.0.0.1")
    _, own_cert, own_key = issued(tmp_path, authority, "worker")
    async with guarded_server(tmp_path, tls=TlsFiles(cert=cert, key=key, ca=ca)) as guarded:
        url = f"tls://127.0.0.1:{guarded.url.rpartition(':')[2]}"
        nkey = guarded.files.users["encode"].nkey
        fields = {"nats_url": url, "nats_nkey": nkey, "nats_ca": ca, "connect_timeout_s": 2.0}
        assert await opened(BusConfig.from_env("encode", {}, nats_cert=own_cert, nats_key=own_key, **fields))
        with pytest.raises(ConnectionLost):
            await opened(BusConfig.from_env("encode", {}, **fields))
        os.chmod(own_key, 0o644)
        with pytest.raises(ConfigError, match="NIXLBUS_NATS_KEY"):
            await opened(BusConfig.from_env("encode", {}, nats_cert=own_cert, nats_key=own_key, **fields))


async def test_a_tls_url_tells_nothing_to_a_server_without_tls(locked: EmbeddedServer) -> None:
    address = locked.url.removeprefix("nats://")
    with pytest.raises(ConnectionLost, match="offers no TLS"):
        await opened(config(nats_url=f"tls://someone:{PASSWORD}@{address}"))


def jwt(claims: dict[str, object], issuer: nkeys.KeyPair) -> str:
    """A NATS JWT, signed: what `nsc` makes."""

    def part(value: dict[str, object]) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    claims = {"iat": int(time.time()), "iss": issuer.public_key.decode(), "jti": secrets.token_hex(8), **claims}
    signed = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(claims)}"
    return f"{signed}.{base64.urlsafe_b64encode(issuer.sign(signed.encode())).decode().rstrip('=')}"


async def test_a_credentials_file_of_nats_connects_and_its_user_s_permissions_hold(tmp_path: Path) -> None:
    pairs = {}
    for name, prefix in (("operator", 14 << 3), ("account", 0), ("user", 20 << 3)):
        pairs[name] = nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), prefix)))
    subject = {name: pair.public_key.decode() for name, pair in pairs.items()}
    limits = {"subs": -1, "data": -1, "payload": -1}
    operator = jwt({"sub": subject["operator"], "nats": {"type": "operator", "version": 2}}, pairs["operator"])
    account_limits = {**limits, "imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": -1}
    account_claims = {"type": "account", "version": 2, "limits": account_limits}
    account = jwt({"sub": subject["account"], "nats": account_claims}, pairs["operator"])
    user_claims = {
        "type": "user", "version": 2, **limits, "pub": {"allow": ["nixlbus.v1.>"]}, "sub": {"allow": ["_INBOX.w.>"]}
    }  # fmt: skip
    user = jwt({"sub": subject["user"], "nats": user_claims}, pairs["account"])
    path = tmp_path / "server.conf"
    path.write_text(
        f'listen: "127.0.0.1:-1"\nhttp: "127.0.0.1:-1"\noperator: "{operator}"\nresolver: MEMORY\n'
        f'resolver_preload: {{ {subject["account"]}: "{account}" }}\n'
    )
    creds = tmp_path / "user.creds"
    creds.write_text(
        f"-----BEGIN NATS USER JWT-----\n{user}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{bytes(pairs['user'].seed).decode()}\n------END USER NKEY SEED------\n"
    )
    creds.chmod(0o600)
    async with embedded_server(configuration=path) as server:
        assert await opened(config(nats_url=server.url, nats_creds=str(creds)))
        with pytest.raises(PermissionDenied):
            await opened(BusConfig(worker_id="other", nats_url=server.url, nats_creds=str(creds)))
