"""GGUF files, written byte by byte, and weights in their blocks."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from benchmarks.blocks import HALVES
from ktjax.quant import FORMATS
from ktjax.quant.formats import BLOCK_FORMATS

NUMBERS = {
    "F32": (0, np.float32),
    "F16": (1, np.float16),
    "BF16": (30, ml_dtypes.bfloat16),
    "I32": (26, np.int32),
}
BLOCKS = {
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "q2_k": 10,
    "q3_k": 11,
    "q4_k": 12,
    "q5_k": 13,
    "q6_k": 14,
    "iq4_nl": 20,
    "iq4_xs": 23,
}
assert tuple(BLOCKS) == BLOCK_FORMATS


class Tensor(NamedTuple):
    type: int
    shape: tuple[int, ...]
    data: bytes


def tensor(array: np.ndarray, format: str | None = None) -> Tensor:
    """A tensor of numbers, or of blocks of a format, which are uint8."""
    if format is None:
        (number,) = (n for n, dtype in NUMBERS.values() if array.dtype == dtype)
        return Tensor(number, array.shape, array.tobytes())
    spec = FORMATS[format]
    depth = array.shape[-1] // spec.block_bytes * spec.group
    return Tensor(BLOCKS[format], (*array.shape[:-1], depth), array.tobytes())


def halves(blocks: np.ndarray, format: str) -> list[np.ndarray]:
    """The half-precision numbers of `[n, bytes]` blocks, one array a place; copies."""
    places = HALVES.get(format, (0,))
    return [blocks[:, at : at + 2].copy().view(np.float16)[:, 0] for at in places]


def write_gguf(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any] | None = None,
    *,
    version: int = 3,
    alignment: int = 32,
) -> Path:
    """A file; metadata are strings, ints (uint32) or lists of strings."""

    def text(value: str) -> bytes:
        data = value.encode()
        return struct.pack("<Q", len(data)) + data

    def pair(value: Any) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, int):
            return struct.pack("<II", 4, value)
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))

    metadata = metadata or {}
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(text(key) + pair(value) for key, value in metadata.items())
    data = b""
    for name, (type, shape, content) in tensors.items():
        header += text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", type, len(data))
        data += content + b"\0" * (-len(content) % alignment)
    header += b"\0" * (-len(header) % alignment)
    path.write_bytes(header + data)
    return path
