"""Random ids that nobody guesses: of requests, and of the reply subjects that their answers go to.

In: nothing. Out: 16 hex digits, 64 bits of the system's randomness. The system is asked once in a while, for many ids:
asking costs more than the rest of an id.
"""

import secrets

_NUM_DIGITS = 16
_NUM_IDS_AT_ONCE = 256


class RandomIds:
    """Makes ids, for one owner on one thread."""

    __slots__ = ("_offset", "_random")

    def __init__(self) -> None:
        self._random = ""
        self._offset = 0

    def new(self) -> str:
        """16 hex digits."""
        start = self._offset
        if start == len(self._random):
            self._random, start = secrets.token_hex(_NUM_IDS_AT_ONCE * _NUM_DIGITS // 2), 0
        self._offset = start + _NUM_DIGITS
        return self._random[start : start + _NUM_DIGITS]
