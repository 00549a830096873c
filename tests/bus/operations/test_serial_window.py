from hypothesis import given
from hypothesis import strategies as st

from bus.operations.serial_window import WINDOW, SerialWindow


@given(st.lists(st.integers(1, 300) | st.integers(WINDOW - 5, WINDOW * 3), max_size=60))
def test_a_serial_is_admitted_once_and_only_if_it_is_not_too_old(serials: list[int]) -> None:
    window, used, highest = SerialWindow(), set(), 0
    for serial in serials:
        is_new = serial not in used and serial > highest - WINDOW
        assert window.admit(serial) is is_new
        used.add(serial)
        highest = max(highest, serial)


def test_serials_are_counted_from_one() -> None:
    assert not SerialWindow().admit(0)
