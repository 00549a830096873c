"""What a caller names to be asked, and what he is told who names something else.

In: the first argument of `Bus.request` and its like. Out: a `LocalProtocolError` that says what it is and which method
takes it.
"""

from collections.abc import Sequence
from typing import Any

from bus.errors import LocalProtocolError
from schemas.subjects import Subject

_OF_A_SUBJECT = "bus.request, bus.stream, bus.publish; a job's queue by bus.submit"


def wrong_target(target: Any, method: str) -> LocalProtocolError:
    """`target` is nothing that `bus.<method>` takes."""
    taken_by: str = getattr(target, "taken_by", "")  # what a worker's class declares says it itself
    if isinstance(target, Subject):
        what, taken_by = f"the subject {target.name}", _OF_A_SUBJECT
    elif taken_by:
        what = str(target)
    elif isinstance(target, str):
        what = f"the str {target[:80]!r}"
    else:
        what = f"{getattr(target, '__qualname__', type(target).__name__)}, which is no declaration"
    remedy = (
        f"it is taken by {taken_by}"
        if taken_by
        else "name what a worker's class declares (Calculator.add), or a subject that bus.subjects builds"
    )
    return LocalProtocolError(f"bus.{method} was given {what}", remedy=remedy)


def subjects_of(target: Any, method: str) -> Sequence[Subject]:
    """One subject or several, as several. Raises what `wrong_target` makes."""
    if isinstance(target, Subject):
        return (target,)
    if isinstance(target, Sequence) and not isinstance(target, str) and all(isinstance(e, Subject) for e in target):
        return target
    raise wrong_target(target, method)


def incomplete(method: str, missing: str) -> LocalProtocolError:
    """A subject alone says less than a declared endpoint."""
    return LocalProtocolError(
        f"bus.{method} was given a subject and no {missing}", remedy="a declared endpoint (Calculator.add) brings it"
    )
