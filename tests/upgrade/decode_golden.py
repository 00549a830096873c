"""Reads golden bytes with whatever nixlbus stands on the PYTHONPATH.

Standard input: JSON, message tag to hexadecimal. Standard output: JSON, for each tag that this version knows what it
understood, encoded again, in hexadecimal; or why it couldn't read it.
"""

import json
import sys

from schemas import fault, generate, handshake, operations, performance, stages, traces
from schemas.codec import MessageError, decode, encode
from schemas.message import Message

MODULES = (fault, generate, handshake, operations, performance, stages, traces)


def known_types() -> dict[str, type[Message]]:
    """Every message of this version, by tag."""
    values = [value for module in MODULES for value in vars(module).values() if isinstance(value, type)]
    types = [value for value in values if issubclass(value, Message) and value is not Message]
    return {str(each.__struct_config__.tag): each for each in types}


def main() -> None:
    types = known_types()
    understood: dict[str, str] = {}
    for tag, golden in json.load(sys.stdin).items():
        if tag in types:
            try:
                understood[tag] = encode(decode(bytes.fromhex(golden), types[tag])).hex()
            except MessageError as error:
                understood[tag] = f"{type(error).__name__}: {error}"
    json.dump(understood, sys.stdout)


if __name__ == "__main__":
    main()
