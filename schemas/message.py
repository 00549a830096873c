"""`Message`, the base of everything on the wire: a frozen, tagged struct that packs to one plain msgpack map.

The `type` field is the tag. A missing or ill-typed field is an error that names it; an unknown field is ignored, so
that a newer peer may add one; a field that holds its default is left out.
"""

import msgspec


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", omit_defaults=True):
    """A typed message. Subclasses give their tag as `tag="stage.noun"`."""


class Part(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A map inside a message; it has no tag of its own."""
