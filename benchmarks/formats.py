"""Storage formats as the command line has them, what they weigh, and weights in them.

`NAME`, `NAME/GROUP_SIZE` or `NAME/GROUP_SIZE/z`, the last with zero points: int8,
int4_kgroup/32, int4_kgroup/128/z. Of GGUF's formats `NAME` or `NAME+NAME`, the second
that of down: q4_k+q6_k. Peers have bfloat16 only, so nothing that runs in
their processes imports this module, and with it ktjax.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from benchmarks import cases
from benchmarks.blocks import random_blocks
from benchmarks.shapes import Shape
from ktjax.quant.formats import BLOCK_FORMATS, Encoding, Quantized

_PATTERN = re.compile(r"(\w+)(?:/(\d+)(/z)?|\+(\w+))?")


def encodings(text: str) -> tuple[Encoding, Encoding]:
    """The formats that a text names: of gate and up, and of down.

    Raises:
      ValueError: no such format, it does not have this group size or zero points, or
        two that cannot be mixed.
    """
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(
            "format: expected NAME, NAME/GROUP_SIZE, NAME/GROUP_SIZE/z or NAME+NAME, "
            f"got {text!r}"
        )
    name, group_size, zero_point, down = match.groups()
    where = f"format {text!r}"
    chosen = Encoding.of(
        name, int(group_size) if group_size else None, bool(zero_point), where=where
    )
    if down is None:
        return chosen, chosen
    if not {name, down} <= set(BLOCK_FORMATS):
        raise ValueError(f"{where}: only formats of GGUF mix: {list(BLOCK_FORMATS)}")
    return chosen, Encoding.of(down, where=where)


def encoding(text: str) -> Encoding:
    """The format of gate and up; see `encodings`."""
    return encodings(text)[0]


def canonical(text: str) -> str:
    """The same format with its group size written out, where it has a choice of them.

    Raises:
      ValueError: as `encoding`.
    """
    found, down = encodings(text)
    group = f"/{found.group_size}" if found.spec.group_sizes else ""
    mixed = f"+{down.format}" if down != found else ""
    return found.format + group + "/z" * found.zero_point + mixed


def expert_bytes(shape: Shape, text: str) -> int:
    """Codes, scales and zeros of one expert's gate, up and down, without padding."""
    found, down = encodings(text)
    inward = found.nbytes(shape.intermediate, shape.hidden)
    return 2 * inward + down.nbytes(shape.hidden, shape.intermediate)


def check_sizes(shape: Shape, text: str) -> None:
    """Whether the format can hold the layer.

    Raises:
      ValueError: its groups do not divide the sizes.
    """
    found, down = encodings(text)
    found.check_depth(shape.hidden, where=f"shape {shape.name}: hidden")
    down.check_depth(shape.intermediate, where=f"shape {shape.name}: intermediate")


def weights(shape: Shape, text: str) -> dict[str, Any]:
    """gate, up and down for `ExpertStore.from_arrays`: float arrays, or random blocks.

    All experts of a matrix in blocks have the same rows, each in another order.
    """
    found, down = encodings(text)
    if not found.spec.block_bytes:
        return dict(cases.weights(shape))
    inward = (shape.intermediate, shape.hidden)
    matrices = {}
    for seed, (name, chosen, sizes) in enumerate(
        (("gate", found, inward), ("up", found, inward), ("down", down, inward[::-1]))
    ):
        one = random_blocks(chosen.format, sizes, seed)
        experts = np.stack([np.roll(one, e, axis=0) for e in range(shape.experts)])
        matrices[name] = Quantized(experts)
    return matrices
