"""The files of a guarded nats-server: its configuration, a key for each user, the workers' shared key.

In: roles and settings. Out: a folder

    server/nats-server.conf   for nats-server; public keys alone, readable by whoever may enter the folder
    <user>/nats.nkey          the user's seed, mode 0600 in a folder of mode 0700: NIXLBUS_NATS_NKEY
    <user>/nixlbus.key        the shared key, of the roles that move tensors: NIXLBUS_KEY_FILE
    sys/nats.nkey             the seed of the system account's user

so that each user can be given its own folder and no other. Keys that are there are kept, and a new role gets the shared
key of the others; the configuration is written anew. A file appears whole or not at all.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from bus.control_plane.credentials import check_seed, private_bytes
from bus.control_plane.permissions import SYSTEM_USER, Roles, permissions
from bus.control_plane.server_configuration import ServerSettings, User, guarded_configuration
from bus.handshake.authentication import KeyRing, write_key_file
from schemas.subjects import DEFAULT_PREFIX

NKEY_FILE, SHARED_KEY_FILE = "nats.nkey", "nixlbus.key"
_SEED_BYTES = 32


class UserFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of one user's files; `shared_key` is empty for who moves no tensors."""

    nkey: str
    shared_key: str = ""


class ServerFiles(msgspec.Struct, frozen=True, kw_only=True):
    """Paths of what was written."""

    configuration: str
    users: dict[str, UserFiles]


def write_server_files(
    out: Path,
    roles: Roles,
    settings: ServerSettings,
    *,
    keys_per_instance: Mapping[str, int] | None = None,
    prefix: str = DEFAULT_PREFIX,
) -> ServerFiles:
    """Write the folder `out` and return the paths.

    `keys_per_instance`: roles whose workers get a key each, `<role>.1` to `<role>.<n>`, in place of one for the role.
    Raises `ConfigError` for an existing key that is malformed or open to others, `KeyFileError`, `OSError`, and
    `KeyError` for a role that isn't there.
    """
    _private_folder(out)
    entries = user_names(roles, keys_per_instance or {})
    files, users = {}, []
    for name, (role, instance) in entries.items():
        folder = out / name
        _private_folder(folder)
        public_key = _seed(folder / NKEY_FILE)
        granted = permissions(roles, role, instance=instance, prefix=prefix)
        users.append(User(name=name, public_key=public_key, permissions=granted))
        files[name] = UserFiles(
            nkey=str(folder / NKEY_FILE), shared_key=str(folder / SHARED_KEY_FILE) if roles.moves_tensors(role) else ""
        )
    _share_key([Path(each.shared_key) for each in files.values() if each.shared_key])
    _private_folder(out / SYSTEM_USER)
    text = guarded_configuration(settings, users, _seed(out / SYSTEM_USER / NKEY_FILE))
    configuration = out / "server" / "nats-server.conf"
    configuration.parent.mkdir(exist_ok=True)
    _write(configuration, text.encode(), 0o644, replace=True)
    files[SYSTEM_USER] = UserFiles(nkey=str(out / SYSTEM_USER / NKEY_FILE))
    return ServerFiles(configuration=str(configuration), users=files)


def user_names(roles: Roles, keys_per_instance: Mapping[str, int]) -> dict[str, tuple[str, str]]:
    """Each user's name with its role and, for a key of one worker, its instance. Raises `KeyError`."""
    for role in keys_per_instance:
        roles.roles[role]
    names = {}
    for role in roles.roles:
        count = keys_per_instance.get(role, 0)
        instances = [str(number + 1) for number in range(count)] or [""]
        names.update({f"{role}.{instance}" if instance else role: (role, instance) for instance in instances})
    return names


def _seed(path: Path) -> str:
    """Make a seed file unless it is there; returns its public key."""
    import nkeys

    if not path.exists():
        _write(path, nkeys.encode_seed(secrets.token_bytes(_SEED_BYTES), nkeys.PREFIX_BYTE_USER), 0o600)
    return check_seed(private_bytes("NIXLBUS_NATS_NKEY", str(path)).strip(), str(path))


def _share_key(paths: Sequence[Path]) -> None:
    """Give every path the same key: the one that is there, or a fresh one. A key that is there stays."""
    if not paths:
        return
    held = next((path for path in paths if path.exists()), None)
    if held is None:
        held = paths[0]
        write_key_file(held)
    KeyRing.load(str(held))
    for path in paths:
        if not path.exists():
            _write(path, held.read_bytes(), 0o600)


def _private_folder(path: Path) -> None:
    path.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.stat().st_uid == os.getuid():
        path.chmod(0o700)


def _write(path: Path, content: bytes, mode: int, *, replace: bool = False) -> None:
    """Make a file in one step; one that has come meanwhile stays unless `replace`."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
        if replace:
            draft.replace(path)
        else:
            path.hardlink_to(draft)
    except FileExistsError:
        return
    finally:
        draft.unlink(missing_ok=True)
