"""Incremental detokenisation: token ids in, text out, never half a character.

A byte-level tokenizer may spread one character over several tokens. A decoder shows the bytes of an unfinished one as
U+FFFD at the end of the text, so text that ends in U+FFFD is held back until more tokens settle it. The text of the new
tokens is the difference between two decodings that begin at the same earlier token, because some decoders write a
token differently at the start of a text.

Invariant: what `push` and `finish` return, joined, is `decode` of all the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_UNFINISHED = "\ufffd"

Decode = Callable[[Sequence[int]], str]


class DecodedTextStream:
    """The `TextStream` of a tokenizer's decode function, which must skip special tokens."""

    def __init__(self, decode: Decode) -> None:
        self._decode = decode
        self._token_ids: list[int] = []
        self._context_start = 0  # where the decodings that are compared begin
        self._num_returned = 0  # the tokens whose text was returned
        self._returned: list[str] = []

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes tokens and returns the text that they complete, perhaps none."""
        self._token_ids += token_ids
        before = self._decode(self._token_ids[self._context_start : self._num_returned])
        after = self._decode(self._token_ids[self._context_start :])
        if after.endswith(_UNFINISHED) or not after.startswith(before):
            return ""
        if len(after) > len(before):  # a special token alone is no context
            self._context_start = self._num_returned
        self._num_returned = len(self._token_ids)
        text = after[len(before) :]
        self._returned.append(text)
        return text

    def finish(self) -> str:
        """Returns what was held back: bytes that never became a character show as U+FFFD."""
        text = self._decode(self._token_ids).removeprefix("".join(self._returned))
        self._returned.append(text)
        return text
