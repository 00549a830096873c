"""Which serial numbers were used: a sliding window, so that nothing is used twice and little is remembered.

In: serials, counted from 1, in any order and repeated. Out: whether one is new. What is older than the window counts as
used. The method is that of IPsec against replays (RFC 4303, 3.4.3).
"""

WINDOW = 65_536
"""Serials back from the highest: a grant that so many others have overtaken is refused."""


class SerialWindow:
    """The window of one sender: 8 KiB."""

    __slots__ = ("_bits", "_highest")

    def __init__(self) -> None:
        self._highest = 0
        self._bits = bytearray(WINDOW // 8)

    def admit(self, serial: int) -> bool:
        """Use a serial; False if it was used before, or is too old to tell."""
        if serial > self._highest:
            self._forget(serial)
            self._highest = serial
        elif serial <= self._highest - WINDOW or serial < 1:
            return False
        at, bit = (serial % WINDOW) >> 3, 1 << (serial & 7)
        if self._bits[at] & bit:
            return False
        self._bits[at] |= bit
        return True

    def _forget(self, serial: int) -> None:
        if serial - self._highest >= WINDOW:
            self._bits = bytearray(WINDOW // 8)
            return
        for passed in range(self._highest + 1, serial + 1):
            self._bits[(passed % WINDOW) >> 3] &= ~(1 << (passed & 7))
