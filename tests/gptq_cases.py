"""Small checkpoints in the layouts of GPTQ and AWQ, packed number by number."""

from __future__ import annotations

import json

import numpy as np
from checkpoint_formats import NAMES

from ktjax.io import save_file
from ktjax.quant.floats import round_bfloat16

GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class Matrix:
    """Random codes, zero points and float16 scales of one matrix [outputs, depth]."""

    def __init__(self, outputs, depth, group, rng, *, symmetric=False):
        group = depth if group == -1 else group
        self.group = group
        self.codes = rng.integers(0, 16, (outputs, depth))
        shape = (outputs, depth // group)
        self.zeros = np.full(shape, 8) if symmetric else rng.integers(0, 16, shape)
        self.scales = rng.uniform(0.002, 0.02, shape).astype(np.float16)

    def values(self):
        """What the kernels must use: exact in float32, rounded once."""
        scales, zeros = (
            np.repeat(a, self.group, axis=1) for a in (self.scales, self.zeros)
        )
        return round_bfloat16((self.codes - zeros) * scales.astype(np.float32))

    def gptq(self, at, version=1):
        depth = self.codes.shape[1]
        zeros = _words(self.zeros.T, 1, range(8))
        if version == 1:  # as the programs write it: 1 from each, with borrows
            zeros = zeros - np.uint32(0x11111111)
        return {
            f"{at}.qweight": _words(self.codes.T, 0, range(8)).view(np.int32),
            f"{at}.qzeros": zeros.view(np.int32),
            f"{at}.scales": np.ascontiguousarray(self.scales.T),
            f"{at}.g_idx": (np.arange(depth) // self.group).astype(np.int32),
        }

    def awq(self, at):
        return {
            f"{at}.qweight": _words(self.codes.T, 1, AWQ_ORDER).view(np.int32),
            f"{at}.qzeros": _words(self.zeros.T, 1, AWQ_ORDER).view(np.int32),
            f"{at}.scales": np.ascontiguousarray(self.scales.T),
        }


def _words(numbers, axis, order):
    """Nibble i of a word is number order[i] of eight along the axis."""
    numbers = np.moveaxis(numbers, axis, -1).astype(np.uint32)
    words = np.zeros((*numbers.shape[:-1], numbers.shape[-1] // 8), np.uint32)
    for word in range(words.shape[-1]):
        for nibble, number in enumerate(order):
            words[..., word] |= numbers[..., 8 * word + number] << (4 * nibble)
    return np.ascontiguousarray(np.moveaxis(words, -1, axis))


def layer(group, *, experts=3, hidden=128, inner=256, symmetric=False, seed=0):
    """gate, up and down, a `Matrix` for each expert."""
    rng = np.random.default_rng(seed)
    sizes = ((inner, hidden), (inner, hidden), (hidden, inner))
    return [
        [Matrix(*size, group, rng, symmetric=symmetric) for _ in range(experts)]
        for size in sizes
    ]


def tensors_of(matrices, pack=Matrix.gptq, folder="mlp.experts", names=NAMES):
    """The tensors of layer 0."""
    return {
        key: tensor
        for name, experts in zip(names, matrices, strict=True)
        for expert, matrix in enumerate(experts)
        for key, tensor in pack(
            matrix, f"model.layers.0.{folder}.{expert}.{name}"
        ).items()
    }


def write(directory, tensors, quantization=GPTQ, file="config.json"):
    """A checkpoint's directory."""
    directory.mkdir(exist_ok=True)
    save_file(directory / "model.safetensors", tensors)
    if quantization is not None:
        content = {"quantization_config": quantization}
        content = content if file == "config.json" else quantization
        (directory / file).write_text(json.dumps(content))
    return directory
