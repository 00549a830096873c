"""The URL of NATS: one, or several with commas; a user and a password or a token may stand in it, and are never shown.

In: the text of NIXLBUS_NATS_URL. Out: whether it can be used, whether it names a user, and the text without secrets.
Pure; imports nothing of nats, so that the configuration can be checked and shown without it.
"""

import re
from urllib.parse import urlsplit

SCHEMES = ("nats", "tls", "ws", "wss")
ENCRYPTED_SCHEMES = ("tls", "wss")


def redacted(url: str) -> str:
    """The URL without users, passwords and tokens: whatever stands before the last @ of each part is left out."""
    return ",".join(re.sub(r"^([^/]*//)?.*@", r"\1", part, flags=re.DOTALL) for part in url.split(","))


def is_usable(url: str) -> bool:
    """Whether each part has a scheme that NATS knows, or none, and a host."""
    return all(_is_usable(part.strip()) for part in url.split(","))


def names_user(url: str) -> bool:
    """Whether a user or a token stands in it."""
    return "@" in url


def is_encrypted(url: str) -> bool:
    """Whether each part asks for TLS."""
    return all(part.strip().partition("://")[0] in ENCRYPTED_SCHEMES for part in url.split(","))


def _is_usable(part: str) -> bool:
    try:
        parsed = urlsplit(part if "://" in part else f"nats://{part}")
        port = parsed.port
    except ValueError:  # its text holds what may be a password
        return False
    return parsed.scheme in SCHEMES and bool(parsed.hostname) and (port is None or port > 0)
