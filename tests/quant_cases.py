"""Every storage format that weights can be quantised to, with its options.

Those of GGUF, which are read only, are in gguf_cases.py.
"""

from __future__ import annotations

import numpy as np

from ktjax import quant
from ktjax.quant import Encoding

# Every format with every option.
ENCODINGS = [
    Encoding.of(name, size, zeros)
    for name, row in quant.FORMATS.items()
    if not row.block_bytes
    for size in row.group_sizes or (None,)
    for zeros in ((False, True) if row.group_sizes else (False,))
]
QUANTIZED = [e for e in ENCODINGS if e.format != "bf16"]


def encoding_id(encoding: Encoding) -> str:
    name, group, zeros = encoding
    chosen = f"-{group}" if encoding.spec.group_sizes else ""
    return f"{name}{chosen}{'-zeros' if zeros else ''}"


def options(encoding: Encoding) -> dict:
    """Keyword arguments of `encode` and `ExpertStore.from_arrays`."""
    chosen = {"format": encoding.format}
    if encoding.spec.group_sizes:
        chosen |= {"group_size": encoding.group_size, "zero_point": encoding.zero_point}
    return chosen


def encode(w, encoding: Encoding) -> quant.Quantized:
    return quant.encode(w, **options(encoding))


def gaussian(shape, seed=0, std=1.0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, np.float32) * np.float32(std)
