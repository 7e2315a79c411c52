"""The numbers of one tensor of a GGUF file, whatever type it has there."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from ktjax.io.gguf import DTYPES, GGUFCheckpoint
from ktjax.io.header import CheckpointError
from ktjax.quant import dequantize_blocks
from ktjax.quant.formats import BLOCK_FORMATS

Array = np.ndarray[Any, Any]

_FLOATS = ("F32", "F16", "BF16", "F64")


def read_gguf_values(checkpoint: GGUFCheckpoint, name: str) -> Array:
    """The tensor `name` as numbers.

    Returns:
      Its `shape`: F32 and BF16 in their own dtype, views of the file; all others in
      float32.

    Raises:
      KeyError: there is no such tensor.
      CheckpointError: a type that is not read.
    """
    type, stored = checkpoint.descriptor(name).type.name, checkpoint[name]
    if type in _FLOATS:
        exact = DTYPES[type] in (np.float32, ml_dtypes.bfloat16)
        return stored if exact else stored.astype(np.float32)
    if type.lower() not in BLOCK_FORMATS:
        known = (*_FLOATS, *(format.upper() for format in BLOCK_FORMATS))
        raise CheckpointError(
            f"{checkpoint.path}: {name}: type {type} is not read; types that are: "
            f"{', '.join(known)}"
        )
    return dequantize_blocks(stored, type.lower())
