"""Storage formats as the command line has them, and what they weigh.

`NAME`, `NAME/GROUP_SIZE` or `NAME/GROUP_SIZE/z`, the last with zero points: int8,
int4_kgroup/32, int4_kgroup/128/z. Peers have bfloat16 only, so nothing that runs in
their processes imports this module, and with it ktjax.
"""

from __future__ import annotations

import re

from benchmarks.shapes import Shape
from ktjax.quant.formats import Encoding

_PATTERN = re.compile(r"(\w+)(?:/(\d+)(/z)?)?")


def encoding(text: str) -> Encoding:
    """The format that a text names.

    Raises:
      ValueError: no such format, it does not have this group size or zero points, or
        weights cannot be quantised to it.
    """
    match = _PATTERN.fullmatch(text)
    if not match:
        raise ValueError(
            f"format: expected NAME, NAME/GROUP_SIZE or NAME/GROUP_SIZE/z, got {text!r}"
        )
    name, group_size, zero_point = match.groups()
    where = f"format {text!r}"
    chosen = Encoding.of(
        name, int(group_size) if group_size else None, bool(zero_point), where=where
    )
    chosen.check_encoded(where=where)
    return chosen


def canonical(text: str) -> str:
    """The same format with its group size written out, where it has a choice of them.

    Raises:
      ValueError: as `encoding`.
    """
    found = encoding(text)
    group = f"/{found.group_size}" if found.spec.group_sizes else ""
    return found.format + group + "/z" * found.zero_point


def expert_bytes(shape: Shape, text: str) -> int:
    """Codes, scales and zeros of one expert's gate, up and down, without padding."""
    found = encoding(text)
    inward = found.nbytes(shape.intermediate, shape.hidden)
    return 2 * inward + found.nbytes(shape.hidden, shape.intermediate)


def check_sizes(shape: Shape, text: str) -> None:
    """Whether the format can hold the layer.

    Raises:
      ValueError: its groups do not divide the sizes.
    """
    found = encoding(text)
    for name in ("hidden", "intermediate"):
        size = getattr(shape, name)
        found.check_depth(size, where=f"shape {shape.name}: {name}")
