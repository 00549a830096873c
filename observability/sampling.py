"""Which traces are recorded: the sampler that the environment names, and its answer before a span is made.

In: OTEL_TRACES_SAMPLER, OTEL_TRACES_SAMPLER_ARG. Out: a sampler for the SDK, and `drops`, the same decision from what a
span is known by before it exists, so that a span that nobody will see costs no attributes, no ids and no context.
Invariants: `drops` and the SDK's sampler never differ; a bad value is warned of by name and ignored, as the
specification wants.
Leaves out: samplers that ask a server (jaeger_remote, xray): the SDK has none of them.
Source: https://opentelemetry.io/docs/specs/otel/configuration/sdk-environment-variables/ and the SDK's samplers 1.45.
"""

import logging
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.sampling import Sampler

logger = logging.getLogger(__name__)

DEFAULT = "parentbased_always_on"
_RATIOS = {"always_on": 1.0, "always_off": 0.0, "traceidratio": None}
_PARENT_BASED = "parentbased_"
# The samplers decide by the lower half of a trace id.
_TRACE_ID_MASK = (1 << 64) - 1


class HeadSampler:
    """A decision by trace id, for all spans or for those that begin a trace here."""

    def __init__(self, name: str = DEFAULT, ratio: float = 1.0) -> None:
        """`name` is one of the specification's, in lower case; `ratio` is read by the traceidratio ones."""
        self.follows_parent = name.startswith(_PARENT_BASED)
        """Whether a span with a parent is recorded exactly if its parent is."""
        fixed = _RATIOS[name.removeprefix(_PARENT_BASED)]
        self._ratio = ratio if fixed is None else fixed
        self._bound = round(self._ratio * (_TRACE_ID_MASK + 1))

    @property
    def keeps_all(self) -> bool:
        """Whether every trace that begins here is recorded."""
        return self._ratio == 1.0

    @classmethod
    def from_environment(cls) -> "HeadSampler":
        """The sampler that OTEL_TRACES_SAMPLER names, `parentbased_always_on` by default."""
        name = os.environ.get("OTEL_TRACES_SAMPLER", "").strip().lower() or DEFAULT
        if name.removeprefix(_PARENT_BASED) not in _RATIOS:
            logger.warning("OTEL_TRACES_SAMPLER must be one of the six standard names, not %r: using %s", name, DEFAULT)
            return cls()
        if not name.endswith("traceidratio"):
            return cls(name)
        return cls(name, _ratio_of_environment())

    def drops(self, trace_id: int) -> bool:
        """Whether a span of that trace is not recorded, its parent's decision aside."""
        return trace_id & _TRACE_ID_MASK >= self._bound

    def for_sdk(self) -> "Sampler":
        """The same as the SDK has it."""
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased

        root = TraceIdRatioBased(self._ratio)
        return ParentBased(root) if self.follows_parent else root


def _ratio_of_environment() -> float:
    text = os.environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip()
    if not text:
        return 1.0
    try:
        ratio = float(text)
    except ValueError:
        ratio = -1.0
    if 0 <= ratio <= 1:
        return ratio
    logger.warning("OTEL_TRACES_SAMPLER_ARG must be a number from 0 to 1, not %r: using 1", text)
    return 1.0
