"""What a bus proves itself to NATS with: from the configuration's files to nats-py's connect options.

In: a `BusConfig`. Out: keyword arguments for `Client.connect`, or a `ConfigError` that names the variable, before
anything is sent. Invariants: a file with a secret that others may read is refused; no secret stands in an error, in a
log line or in the options themselves, which hold paths (nats-py reads the seed anew at each connection, so that a
replaced file counts from the next one on); TLS settings are an error with a URL that doesn't ask for TLS.
"""

import os
import ssl
import stat
from pathlib import Path
from typing import Any

from bus.config import BusConfig, ConfigError
from bus.control_plane.nats_url import is_encrypted

_JWT_MARK = b"-----BEGIN NATS USER JWT-----"
_SEED_MARK = b"-----BEGIN USER NKEY SEED-----"


def connect_options(config: BusConfig) -> dict[str, Any]:
    """The options of `Client.connect` for `config`'s credentials and TLS; none of both are no options.

    Raises `ConfigError` for a file that is missing, malformed or readable by others, and for settings that exclude
    each other.
    """
    options: dict[str, Any] = {}
    if config.nats_creds and config.nats_nkey:
        raise ConfigError("NIXLBUS_NATS_NKEY", config.nats_nkey, "to be set beside NIXLBUS_NATS_CREDS: choose one")
    if config.nats_nkey:
        check_seed(private_bytes("NIXLBUS_NATS_NKEY", config.nats_nkey).strip(), config.nats_nkey)
        options["nkeys_seed"] = config.nats_nkey
    if config.nats_creds:
        _check_creds(config.nats_creds)
        options["user_credentials"] = config.nats_creds
    context = _tls_context(config)
    if context is not None:
        options["tls"] = context
    return options


def check_seed(seed: bytes, path: str) -> str:
    """The public key of a user's seed. Raises `ConfigError`, which names the file and shows nothing of it."""
    import nkeys  # libsodium, which a bus without nkeys needn't load

    try:
        prefix, raw = nkeys.decode_seed(seed)
        is_whole = prefix == nkeys.PREFIX_BYTE_USER and nkeys.encode_seed(raw, prefix) == seed  # it has a checksum
    except (nkeys.NkeysError, ValueError):
        is_whole = False
    if not is_whole:
        raise ConfigError("NIXLBUS_NATS_NKEY", path, "a file with the seed of a user's nkey (SU...), and nothing else")
    public_key: bytes = nkeys.from_seed(bytearray(seed)).public_key
    return public_key.decode()


def private_bytes(variable: str, path: str) -> bytes:
    """The content of a file that only its owner may read. Raises `ConfigError`."""
    try:
        mode = os.stat(path).st_mode
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(variable, path, f"a file that can be read ({error.strerror})") from None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(variable, path, f"for its owner alone (mode {stat.S_IMODE(mode):o}); chmod 600 it")
    return content


def _check_creds(path: str) -> None:
    content = private_bytes("NIXLBUS_NATS_CREDS", path)
    if _JWT_MARK not in content or _SEED_MARK not in content:
        raise ConfigError("NIXLBUS_NATS_CREDS", path, "a NATS credentials file, with a user's JWT and seed")


def _tls_context(config: BusConfig) -> ssl.SSLContext | None:
    asked = {
        "NIXLBUS_NATS_CA": config.nats_ca,
        "NIXLBUS_NATS_CERT": config.nats_cert,
        "NIXLBUS_NATS_KEY": config.nats_key,
    }
    if not is_encrypted(config.nats_url):
        for variable, path in asked.items():
            if path:
                raise ConfigError(variable, path, "of use without a tls:// URL in NIXLBUS_NATS_URL")
        return None
    if bool(config.nats_cert) != bool(config.nats_key):
        missing = "NIXLBUS_NATS_KEY" if config.nats_cert else "NIXLBUS_NATS_CERT"
        raise ConfigError(missing, "", "set, and a certificate and its key go together")
    try:
        context = ssl.create_default_context(cafile=config.nats_ca or None)
    except (OSError, ssl.SSLError):
        raise ConfigError("NIXLBUS_NATS_CA", config.nats_ca, "a file of certificates (PEM)") from None
    if config.nats_cert:
        private_bytes("NIXLBUS_NATS_KEY", config.nats_key)
        try:
            context.load_cert_chain(config.nats_cert, config.nats_key, password=_no_passphrase)
        except (OSError, ssl.SSLError, ValueError):
            expected = "a certificate (PEM) that NIXLBUS_NATS_KEY, without a passphrase, belongs to"
            raise ConfigError("NIXLBUS_NATS_CERT", config.nats_cert, expected) from None
    return context


def _no_passphrase() -> str:
    """Instead of asking at the terminal."""
    raise ValueError("the key has a passphrase")
