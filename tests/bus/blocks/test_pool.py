from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from bus.blocks.pool import block_runs


@given(
    block_ids=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True),
    block_tokens=st.integers(1, 16),
    missing=st.integers(0, 15),
)
def test_runs_are_the_tokens_slots_in_order(block_ids: list[int], block_tokens: int, missing: int) -> None:
    num_tokens = max(1, len(block_ids) * block_tokens - missing % block_tokens)
    slots = [block_id * block_tokens + i for block_id in block_ids for i in range(block_tokens)][:num_tokens]
    runs = list(block_runs(block_ids, block_tokens, num_tokens))
    assert [start + i for start, length in runs for i in range(length)] == slots
    assert all(start + length != following for (start, length), (following, _) in pairwise(runs))
