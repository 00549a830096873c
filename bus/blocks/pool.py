"""A paged pool of KV blocks in one registered tensor, `[layers, 2, blocks, block_tokens, kv_heads, head_dim]`.

In: a number of tokens. Out: `KvBlocks`, a list of blocks on loan, with the extents that a peer writes them through
and the tensor that the model reads. Blocks are taken lowest first, so that a list is mostly one run, and return to
the pool when their holder has freed them and no operation has them pinned.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING

from bus.data_plane.arena import MemoryLease
from bus.data_plane.memory import LocalMemory, RegisteredMemory
from bus.errors import PoolExhausted
from schemas.operations import MemoryExtent, Run

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """Shape of a pool."""

    num_layers: int
    num_blocks: int
    block_tokens: int
    num_kv_heads: int
    head_dim: int
    dtype: "torch.dtype"

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in one layer, keys or values."""
        return self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def shape(self) -> tuple[int, ...]:
        """[layers, 2, blocks, block_tokens, kv_heads, head_dim]."""
        return (self.num_layers, 2, self.num_blocks, self.block_tokens, self.num_kv_heads, self.head_dim)


class KvBlocks(MemoryLease):
    """Blocks for `num_tokens` tokens, in the order of the tokens."""

    def __init__(self, pool: "BlockPool", block_ids: list[int], num_tokens: int, generation: int) -> None:
        super().__init__()
        self.block_ids = block_ids
        self.num_tokens = num_tokens
        self.generation = generation
        self._pool = pool

    @property
    def descriptor(self) -> LocalMemory:
        """Exactly the tokens' bytes, layer by layer, keys before values, token by token."""
        layout = self._pool.layout
        runs = block_runs(self.block_ids, layout.block_tokens, self.num_tokens)
        extent = MemoryExtent(
            region=self._pool.region,
            generation=self.generation,
            runs=[
                Run(offset_bytes=start * layout.token_bytes, length_bytes=length * layout.token_bytes)
                for start, length in runs
            ],
            count=layout.num_layers * 2,
            stride_bytes=layout.num_blocks * layout.block_tokens * layout.token_bytes,
        )
        return LocalMemory([extent], extent.num_bytes, self, self._pool.storage)

    def gather(self) -> "torch.Tensor":
        """A copy of the tokens' keys and values, [layers, 2, tokens, kv_heads, head_dim]."""
        import torch

        layout = self._pool.layout
        blocks = self._pool.storage.index_select(2, torch.tensor(self.block_ids))
        return blocks.reshape(layout.num_layers, 2, -1, layout.num_kv_heads, layout.head_dim)[
            :, :, : self.num_tokens
        ].contiguous()

    def _return(self) -> None:
        self._pool._take_back(self.block_ids)


class BlockPool:
    """The pool; registers its memory once. Not for use from several threads."""

    def __init__(self, memory: RegisteredMemory, layout: BlockLayout) -> None:
        import torch

        self.layout = layout
        self.storage = torch.zeros(layout.shape, dtype=layout.dtype)
        self.region = memory.add(self.storage).region
        self._free = list(range(layout.num_blocks))
        heapify(self._free)
        self._generation = 0

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be handed out now."""
        return len(self._free)

    def allocate(self, num_tokens: int) -> KvBlocks:
        """Blocks for `num_tokens` tokens. Raises `PoolExhausted` with the numbers, and takes none then."""
        needed = -(-num_tokens // self.layout.block_tokens)
        if needed > len(self._free):
            raise PoolExhausted(
                f"{num_tokens} tokens need {needed} KV blocks; {len(self._free)} of {self.layout.num_blocks} are free"
            )
        self._generation += 1
        return KvBlocks(self, [heappop(self._free) for _ in range(needed)], num_tokens, self._generation)

    def _take_back(self, block_ids: Iterable[int]) -> None:
        for block_id in block_ids:
            heappush(self._free, block_id)


def block_runs(block_ids: list[int], block_tokens: int, num_tokens: int) -> Iterator[tuple[int, int]]:
    """Consecutive blocks as (first token slot, number of tokens), the last cut to `num_tokens`."""
    left = num_tokens
    start, length = -1, 0
    for block_id in block_ids:
        slot, taken = block_id * block_tokens, min(block_tokens, left)
        left -= taken
        if start + length == slot:
            length += taken
            continue
        if length:
            yield start, length
        start, length = slot, taken
    if length:
        yield start, length
