"""What a page says in code spans, held against the code."""

import inspect
import re

import bus
import schemas.message
import schemas.operations
from bus import (
    ArenaTensor,
    Bus,
    BusConfig,
    BusError,
    Claim,
    Descriptor,
    PeerOutcome,
    ReadableOperation,
    TransferReport,
    WriteOperation,
)
from bus.config import _READERS
from bus.data_plane.memory import TensorArena
from schemas.operations import RdmaMetadata

MODULES = (bus, schemas.message, schemas.operations)
CLASSES = {
    "Bus": (Bus,),
    "bus": (Bus,),
    "bus.arena": (TensorArena,),
    "operation": (ReadableOperation, WriteOperation),
    "report.transfer": (TransferReport,),
    "slot": (ArenaTensor,),
    "BusConfig": (BusConfig,),
    "BusError": (BusError,),
    "claim": (Claim,),
    "descriptor": (Descriptor,),
    "metadata": (RdmaMetadata,),
    "outcome": (PeerOutcome,),
}
"""What stands before a dot on our pages, and which classes have what follows it."""


def prose_of(page: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)


def code_spans(page: str) -> list[str]:
    """What stands in single backticks, outside of fences; quoted text left out."""
    return [re.sub(r'"[^"]*"', '""', span) for span in re.findall(r"`([^`\n]+)`", prose_of(page))]


def table_rows(page: str, first_title: str) -> list[list[str]]:
    """The cells of the one table whose first column has this title."""
    (table,) = re.findall(rf"^\| {first_title} \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    return [[cell.strip() for cell in row.strip("|").split(" | ")] for row in table.splitlines()]


def assert_our_names_exist(page: str, theirs: frozenset[str] = frozenset()) -> None:
    """Hold `bus.X`, `operation.X` and the like, CamelCase names, keywords and NIXLBUS variables against the code.

    `theirs` are names of another library that the page speaks of.
    """
    spans = code_spans(page)
    unknown = [span for span in spans if not _is_known(span, theirs)]
    assert not unknown, unknown
    assert any(span.startswith("bus.") for span in spans)


def _is_known(span: str, theirs: frozenset[str]) -> bool:
    for keyword in re.findall(r"\b([a-z]\w*)=", span):
        if keyword not in theirs | _KEYWORDS:
            return False
    for owner, name in re.findall(r"\b((?:report\.|bus\.(?=arena\.))?\w+)\.(\w+)", span):
        if owner in CLASSES and not any(name in _attributes(cls) for cls in CLASSES[owner]):
            return False
    for name in re.findall(r"(?<![\w.])[A-Z][a-z]+(?:[A-Z][a-z]+)*\b", span):
        if name not in theirs | {"True", "False", "None"} and not any(hasattr(module, name) for module in MODULES):
            return False
    return all(name in _VARIABLES for name in re.findall(r"NIXLBUS_\w+", span))


_KEYWORDS = {
    name
    for function in (*vars(Bus).values(), Descriptor.__init__)
    if callable(function)
    for name in inspect.signature(function).parameters
}
_VARIABLES = {variable for variable, _, _ in _READERS.values()}


def _attributes(cls: type) -> set[str]:
    names = set(dir(cls))
    for base in cls.__mro__:
        if inspect.isfunction(base.__init__):  # type: ignore[misc]
            names |= set(base.__init__.__code__.co_names)  # type: ignore[misc]
    return names
