"""Memory of measurements: from the arena that requests use, zeroed in pieces beside the event loop's other work."""

import asyncio

import torch

from bus import ArenaTensor, Bus

AT_ONCE_BYTES = 4 << 20
"""About a millisecond."""


async def zeroed(bus: Bus, num_bytes: int) -> ArenaTensor:
    """Memory of the arena whose pages are there and hold nothing of anybody's. Raises `PoolExhausted`."""
    memory = bus.arena.allocate([num_bytes], torch.uint8)
    try:
        for start in range(0, num_bytes, AT_ONCE_BYTES):
            memory.tensor[start : start + AT_ONCE_BYTES].zero_()
            await asyncio.sleep(0)
    except BaseException:
        memory.free()
        raise
    return memory
