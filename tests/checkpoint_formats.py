"""Small quantised checkpoints, in the layouts that are found in the wild."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from quant_cases import encode, gaussian

from ktjax.quant import Encoding, Quantized

NAMES = ("gate_proj", "up_proj", "down_proj")


def matrices(experts=3, hidden=64, intermediate=128, seed=0):
    """gate, up and down in float32."""
    shapes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    return [
        gaussian((experts, *shape), seed + i, std=0.1) for i, shape in enumerate(shapes)
    ]


def tensors_of(at: str, q: Quantized, encoding: Encoding, depth: int) -> dict:
    """The tensors of one quantised matrix `at`."""
    match encoding.format:
        case "fp8_block":
            return {f"{at}.weight": q.values, f"{at}.weight_scale_inv": q.scales}
        case "mxfp8":
            return {f"{at}.weight": q.values, f"{at}.weight_scale": q.scales}
        case "fp8_channel" | "int8":
            # compressed-tensors writes a column, others a vector.
            return {f"{at}.weight": q.values, f"{at}.weight_scale": q.scales[:, None]}
        case "mxfp4":
            return {f"{at}.weight_packed": q.values, f"{at}.weight_scale": q.scales}
    scales = q.scales if q.scales.ndim == 2 else q.scales[:, None]
    return {
        f"{at}.weight_packed": q.values.view(np.int32),
        f"{at}.weight_scale": scales,
        f"{at}.weight_shape": np.array([len(q.values), depth], np.int64),
    }


def expert_tensors(weights, encoding: Encoding, layer=0) -> dict:
    """One layer's tensors, and what they must be read as."""
    tensors = {}
    for name, w in zip(NAMES, weights, strict=True):
        for expert, matrix in enumerate(w):
            at = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            if encoding.format == "bf16":
                tensors[f"{at}.weight"] = matrix.astype(ml_dtypes.bfloat16)
                continue
            q = encode(matrix, encoding)
            tensors |= tensors_of(at, q, encoding, matrix.shape[-1])
    return tensors
