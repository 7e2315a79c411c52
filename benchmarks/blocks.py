"""Weights in the blocks of GGUF, which nothing here quantises to: random ones."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ktjax.quant import FORMATS, dequantize_blocks

# Where the halves of a block are; by default at its beginning.
HALVES = {
    "q2_k": (80, 82),
    "q3_k": (108,),
    "q6_k": (208,),
    **dict.fromkeys(("q4_1", "q5_1", "q4_k", "q5_k"), (0, 2)),
}


def with_halves(blocks: np.ndarray, format: str, values: list[Any]) -> np.ndarray:
    """A copy of `[n, bytes]` blocks with these half-precision numbers, one a place."""
    blocks = blocks.copy()
    for at, value in zip(HALVES.get(format, (0,)), values, strict=True):
        numbers = np.broadcast_to(np.asarray(value, np.float16), len(blocks))
        blocks[:, at : at + 2] = numbers[:, None].copy().view(np.uint8)
    return blocks


@functools.cache
def random_blocks(format: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Any codes and sub-scales, of the size of weights, `[*shape[:-1], bytes]`."""
    spec, rng = FORMATS[format], np.random.default_rng(seed)
    count = math.prod(shape) // spec.group
    blocks = rng.integers(0, 256, (count, spec.block_bytes), dtype=np.uint8)
    size = rng.uniform(0.5, 1.5, count) * rng.choice([-1, 1], count)
    # The minimum is what a mean code is taken for, so that weights have no mean: with
    # one, the sums of a layer cancel, and keep the errors of their terms.
    mean = (2**spec.bits - 1) / 2 * (-1 if format.endswith("_1") else 1)
    sizes = [size, mean * size][: len(HALVES.get(format, (0,)))]
    first = dequantize_blocks(with_halves(blocks, format, sizes), format)
    gain = shape[-1] ** -0.5 / np.sqrt(np.mean(first.astype(np.float64) ** 2))
    blocks = with_halves(blocks, format, [gain * half for half in sizes])
    return blocks.reshape(*shape[:-1], -1)
