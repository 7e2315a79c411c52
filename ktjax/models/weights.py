"""Where the tensors of a model come from: safetensors or GGUF.

Both give a tensor under the name that it has in most families' safetensors, as

    model.layers.0.self_attn.q_proj.weight

and know what it is called where they are.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ktjax.io import Checkpoint, ExpertWeights, read_experts, read_gguf_experts
from ktjax.io.gguf import GGUFCheckpoint, is_gguf
from ktjax.io.gguf_experts import EXPERTS
from ktjax.io.gguf_values import read_gguf_values
from ktjax.io.header import CheckpointError
from ktjax.io.stored import read_dense
from ktjax.models.attention import GQAConfig
from ktjax.models.config import ModelConfig
from ktjax.models.latent_attention import MLAConfig
from ktjax.models.targets import family_name

Array = np.ndarray[Any, Any]


class Weights(Protocol):
    """The tensors of a model.

    Attributes:
      path: of the model, for errors.
    """

    path: Path

    def name_of(self, name: str) -> str:
        """What the tensor of the usual `name` is called here."""

    def read(self, name: str) -> Array:
        """The values of the tensor of the usual `name`, as they are stored or float32.

        Raises:
          KeyError: there is no such tensor.
          CheckpointError: an unknown layout.
        """

    def experts(self, layer_idx: int, num_experts: int) -> ExpertWeights:
        """The routed experts of a layer; errors as of `ktjax.io.read_experts`."""

    def release_pages(self) -> None:
        """Stop counting the pages that were read as memory of this process."""


def open_weights(
    path: str | os.PathLike[str], config: ModelConfig, names: Iterable[str]
) -> Weights:
    """Open the model at `path`.

    Args:
      path: see `from_pretrained`.
      config: its configuration.
      names: the usual names of all its tensors but those of routed experts.

    Raises:
      FileNotFoundError: a file is missing.
      CheckpointError: a file is damaged, or a GGUF file has tensors that the model has
        no place for.
      KeyError: a GGUF file lacks a tensor.
    """
    if is_gguf(path):
        return _GGUFWeights(GGUFCheckpoint(path), config, names)
    return _HuggingFaceWeights(Checkpoint(path), config)


class _HuggingFaceWeights:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig) -> None:
        self.path = checkpoint.path
        self._checkpoint, self._model_type = checkpoint, config.model_type

    def name_of(self, name: str) -> str:
        # transformers may also write Mixtral under the usual names.
        if name in self._checkpoint:
            return name
        return family_name(name, self._model_type)

    def read(self, name: str) -> Array:
        name = self.name_of(name)
        at = name.removesuffix(".weight")
        stored = self._checkpoint
        tensor = stored[name] if at == name else read_dense(stored, at)
        # Exact, and a dtype that models compute in.
        return tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor

    def experts(self, layer_idx: int, num_experts: int) -> ExpertWeights:
        return read_experts(self._checkpoint, layer_idx, num_experts)

    def release_pages(self) -> None:
        self._checkpoint.release_pages()


# What GGUF files call the parts of a model, and of a layer under `blk.N.`.
_GGUF_PARTS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_GGUF_LAYER_PARTS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_experts_gate": "ffn_gate_inp_shexp",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_BLOCK = re.compile(r"blk\.(\d+)\.")
# What the converter reorders of the architecture "llama".
_TURNED = re.compile(r"\.self_attn\.[qk]_proj\.")
# The two halves of kv_b_proj, as newer files have it.
_HALVES = ("attn_k_b", "attn_v_b")


class _GGUFWeights:
    def __init__(
        self, checkpoint: GGUFCheckpoint, config: ModelConfig, names: Iterable[str]
    ) -> None:
        self.path = checkpoint.path
        self._checkpoint, self._config = checkpoint, config
        needed = {part for name in names for part in self._parts(name)}
        for name in needed:
            checkpoint.file_of(name)  # or a KeyError
        surplus = [
            name
            for name in checkpoint
            if name not in needed and not self._is_elsewhere(name)
        ]
        if surplus:
            raise CheckpointError(
                f"{self.path}: tensors that have no place in a {config.model_type} "
                f"model, and without which it would not be the same: "
                f"{', '.join(surplus[:5])} ({len(surplus)} in all)"
            )

    def release_pages(self) -> None:
        self._checkpoint.release_pages()

    def name_of(self, name: str) -> str:
        part, _, kind = name.rpartition(".")
        if kind == "e_score_correction_bias":
            part, kind = f"{part}.e_score_correction", "bias"
        layer = _LAYER.match(part)
        if layer is None:
            return f"{_GGUF_PARTS[part]}.{kind}"
        own = _GGUF_LAYER_PARTS[part[layer.end() :]]
        if own == "ffn_norm" and self._config.model_type == "glm4_moe":
            own = "post_attention_norm"
        return f"blk.{layer[1]}.{own}.{kind}"

    def read(self, name: str) -> Array:
        parts = list(self._parts(name))
        if len(parts) == 2:
            return self._joined(*parts)
        tensor = read_gguf_values(self._checkpoint, parts[0])
        if name.endswith(".mlp.shared_experts_gate.weight"):
            return tensor.reshape(1, -1)
        if self._config.model_type == "mixtral" and _TURNED.search(name):
            assert isinstance(self._config.attention, GQAConfig)
            return _in_halves(tensor, self._config.attention.head_dim)
        return tensor

    def experts(self, layer_idx: int, num_experts: int) -> ExpertWeights:
        return read_gguf_experts(self._checkpoint, layer_idx, num_experts)

    def _joined(self, keys: str, values: str) -> Array:
        """kv_b_proj `[heads * (nope_dim + value_dim), rank]` from its two halves."""
        config = self._config.attention
        assert isinstance(config, MLAConfig)
        heads, rank = config.num_heads, config.kv_rank
        halves = []
        for name, expected in (
            (keys, (heads, rank, config.nope_dim)),
            (values, (heads, config.value_dim, rank)),
        ):
            half = read_gguf_values(self._checkpoint, name)
            if half.shape != expected:
                raise CheckpointError(
                    f"{self.path}: {name} has shape {list(half.shape)}, the "
                    f"configuration asks for {list(expected)}"
                )
            halves.append(half)
        k, v = halves
        return np.concatenate([k.swapaxes(1, 2), v], axis=1).reshape(-1, rank)

    def _parts(self, name: str) -> Iterator[str]:
        """The tensors that the one of the usual `name` is made of."""
        own = self.name_of(name)
        if "attn_kv_b" in own and own not in self._checkpoint:
            yield from (own.replace("attn_kv_b", half) for half in _HALVES)
        else:
            yield own

    def _is_elsewhere(self, name: str) -> bool:
        """Whether it is known what a tensor is that no part of the model is read of."""
        if block := _BLOCK.match(name):
            layer = int(block[1])
            if layer >= self._config.num_hidden_layers:
                return True  # layers that predict further tokens
            if any(half in name for half in _HALVES):
                return f"blk.{layer}.attn_kv_b.weight" in self._checkpoint
            if EXPERTS.fullmatch(name):
                return self._config.is_moe_layer(layer)
        return False


def _in_halves(tensor: Array, head_dim: int) -> Array:
    """Rows of heads whose neighbours turn together, put apart by half a head.

    llama.cpp's converter does the opposite for the architecture "llama".
    """
    if tensor.shape[0] % head_dim:
        return tensor  # which then has the wrong shape
    split = tensor.reshape(-1, head_dim // 2, 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)
