"""The rules are pure: which message they take, what becomes of it."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus.testing.fault_rules import Fault, FaultRule, FaultRules, Parcel, subject_matches


def parcels(number: int) -> list[Parcel]:
    return [Parcel("way", str(index).encode()) for index in range(number)]


@pytest.mark.parametrize(
    ("pattern", "subject", "matches"),
    [
        ("a.b", "a.b", True),
        ("a.b", "a.c", False),
        ("a.*", "a.b", True),
        ("a.*", "a", False),
        ("a.*", "a.b.c", False),
        ("*.b", "a.b", True),
        ("a.>", "a.b", True),
        ("a.>", "a.b.c.d", True),
        ("a.>", "a", False),
        ("a.*.>", "a.b", False),
        ("a.*.>", "a.b.c", True),
        (">", "anything.at.all", True),
        ("a.b*", "a.bc", False),
    ],
)
def test_a_pattern_matches_as_nats_has_it(pattern: str, subject: str, matches: bool) -> None:
    assert subject_matches(pattern, subject) is matches


def test_a_rule_is_spent_after_its_count_and_then_the_next_one_takes() -> None:
    rules = FaultRules()
    rules.add(dropping := FaultRule(Fault.DROP, "a", 2))
    rules.add(delaying := FaultRule(Fault.DELAY, "*", None, 0.5))
    verdicts = [rules.decide("a", parcel) for parcel in parcels(4)]
    assert [(len(verdict.forward), verdict.after_s) for verdict in verdicts] == [(0, 0), (0, 0), (1, 0.5), (1, 0.5)]
    assert (dropping.hits, delaying.hits) == (2, 2)


def test_a_message_that_no_rule_is_for_goes_on_at_once() -> None:
    rules = FaultRules()
    rules.add(FaultRule(Fault.DROP, "a.*", None))
    (parcel,) = parcels(1)
    assert rules.decide("b.c", parcel).forward == (parcel,)


def test_a_duplicated_message_goes_on_twice() -> None:
    rules = FaultRules()
    rules.add(FaultRule(Fault.DUPLICATE, "a", 1))
    first, second = parcels(2)
    assert rules.decide("a", first).forward == (first, first)
    assert rules.decide("a", second).forward == (second,)


@given(st.integers(2, 6), st.integers(0, 8), st.booleans())
def test_a_reordering_rule_loses_nothing_and_doubles_nothing(count: int, number: int, is_removed: bool) -> None:
    rules = FaultRules()
    rules.add(rule := FaultRule(Fault.REORDER, "a", count, 1.0))
    given_ = parcels(number)
    out = list(itertools.chain.from_iterable(rules.decide("a", parcel).forward for parcel in given_))
    out += rules.remove(rule) if is_removed else rules.let_go(rule)
    if number >= count:
        assert out == given_[:count][::-1] + given_[count:]
    else:
        assert out == given_


def test_a_group_that_is_let_go_is_not_begun_again() -> None:
    rules = FaultRules()
    rules.add(rule := FaultRule(Fault.REORDER, "a", 3, 1.0))
    first, second = parcels(2)
    assert rules.decide("a", first).held_by is rule
    assert rules.let_go(rule) == [first]
    assert rules.decide("a", second).forward == (second,)


@pytest.mark.parametrize("pattern", ["", "a..b", "a.>.b", "a b", ".a", "a\tb"])
def test_a_pattern_that_nats_would_not_take_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="no pattern of subjects"):
        FaultRules().add(FaultRule(Fault.DROP, pattern, 1))


@pytest.mark.parametrize(
    ("fault", "count", "seconds"), [(Fault.DROP, 0, 0), (Fault.REORDER, 1, 1), (Fault.DELAY, 1, -1)]
)
def test_a_count_or_time_that_can_t_be_meant_is_refused(fault: Fault, count: int, seconds: float) -> None:
    with pytest.raises(ValueError, match=r"below|no time"):
        FaultRules().add(FaultRule(fault, "a", count, seconds))
