"""Models from safetensors and GGUF; experts go from the file to their store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import track

from ktjax import backend
from ktjax.config import LoRAConfig
from ktjax.experts_load import make_store
from ktjax.io.gguf import is_gguf
from ktjax.models.config import ModelConfig
from ktjax.models.decoder import Decoder, DecoderLayer
from ktjax.models.targets import (
    Projection,
    adapt_projections,
    check_targets,
    experts_name,
    family_name,
    projections,
)
from ktjax.models.weights import Weights, open_weights
from ktjax.nn import FrozenLinear, GatedMLP, ReferenceExperts, RoutedExperts
from ktjax.quant.formats import ENCODED_FORMATS, Encoding, check_compute
from ktjax.store_linear import LinearStore

EXPERTS = ("auto", *ENCODED_FORMATS, "reference")


class _Unloaded(nnx.Module):
    """Stands for experts while the dense part of a model is only shapes."""

    def __call__(self, x: Any, ids: Any, w: Any) -> Any:
        raise RuntimeError("the experts of this layer are not loaded")


def random_streams(seed: int) -> nnx.Rngs:
    """What a model draws from: its adapters' start, and dropout from another stream.

    So adapters start the same whatever is dropped.
    """
    key = jax.random.key(seed)
    return nnx.Rngs(key, dropout=jax.random.fold_in(key, 2**32 - 1))


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    experts: str | None = None,
    group_size: int | None = None,
    zero_point: bool = False,
    compute: Literal["bf16", "int8"] | None = None,
    dense: str | None = None,
    dtype: Any = jnp.bfloat16,
    lora: LoRAConfig | None = None,
    activation_policy: Literal["save", "recompute"] = "save",
    remat: bool = False,
    rngs: nnx.Rngs | None = None,
) -> Decoder:
    """Load a language model from a Hugging Face directory or a GGUF file.

    Experts are read one layer at a time, so beside the model itself at most one layer's
    experts are in memory twice. Where they are stored in the format that was asked for,
    they go into the store as they are; others are quantised, those that are quantised
    already from their exact values and with a warning. On a terminal a progress bar
    counts the layers.

    Args:
      path: a directory with config.json and (sharded) safetensors; or a GGUF file (of
        a split model, any part), or a directory with one model's.
      experts: storage format of the experts in host memory, a name in
        `ktjax.quant.FORMATS`. "auto": the format that the checkpoint has; of GGUF, its
        own blocks. "reference": pure JAX in float32, slow; the oracle. None: "auto" for
        GGUF, "bf16" for safetensors.
      group_size: for int4_kgroup: 32, 64 or 128 depths to a scale; None = what the
        checkpoint has, or else 128.
      zero_point: for int4_kgroup: quantise with zero points.
      compute: "bf16", "int8" or None, as in `ktjax.moe`.
      dense: where the projections of attention, dense layers and shared experts and
        the output head are computed: a storage format puts them into stores, for
        `ktjax.linear`; "xla" leaves them to XLA. None, what is fastest without changing
        a value: a bfloat16 store for those of 65536 weights and more that bfloat16
        holds exactly as they are in `dtype`; XLA for the others, and for all with
        experts="reference" or where JAX's default device is no CPU. Routers, norms,
        tied heads and MLA's kv_b_proj are always XLA's.
      dtype: dtype of everything outside the experts, bfloat16 or float32.
      lora: which modules have adapters, or None: every layer's experts by default.
        Their dropout is on until `model.eval()`; generation is without it in any case.
      activation_policy: "save" or "recompute", as in `ktjax.moe`.
      remat: whether the backward pass computes each layer again, as in `Decoder`.
      rngs: source of the adapters' initial values and, as its stream `dropout`, of
        what is dropped; `random_streams(0)` by default.

    Returns:
      The model: `model(input_ids) -> logits [batch, sequence, vocab]`. The model
      owns its expert stores: they live as long as it, or until `model.close()`. Copies
      that nnx makes of it (`merge`, `clone`) do not.

    Raises:
      FileNotFoundError: a file is missing.
      ConfigError: the model is of a kind that is not built.
      CheckpointError: a file is damaged.
      KeyError: a tensor is missing.
      FrozenTargetError: a target of `lora` fits no module, or one that cannot have
        adapters.
      ValueError: a tensor has another shape than the configuration says, a pattern of
        `lora` that fits no module with adapters, or a bad argument.
    """
    if experts is None:
        experts = "auto" if is_gguf(path) else "bf16"
    if experts not in EXPERTS:
        raise ValueError(
            f"from_pretrained: experts must be one of {', '.join(EXPERTS)}, "
            f"got {experts!r}"
        )
    if experts in ENCODED_FORMATS:
        Encoding.of(experts, group_size, zero_point, where="from_pretrained")
    elif group_size is not None or zero_point:
        raise ValueError(
            "from_pretrained: group_size and zero_point need a format, got "
            f"experts={experts!r}"
        )
    if dense not in (None, "xla", *ENCODED_FORMATS):
        raise ValueError(
            "from_pretrained: dense must be None, xla or one of "
            f"{', '.join(ENCODED_FORMATS)}, got {dense!r}"
        )
    if dense is None and experts == "reference":
        dense = "xla"
    if experts != "auto":  # else each layer's store decides
        check_compute(compute, [experts], where="from_pretrained")
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"from_pretrained: dtype must be bfloat16 or float32, got {dtype}"
        )
    config = ModelConfig.from_pretrained(path)
    rngs = random_streams(0) if rngs is None else rngs
    model = shapes_of(config, dtype=dtype, remat=remat)
    dense_names = [name for name, _, _ in _dense_tensors(model)]
    weights = open_weights(path, config, dense_names)
    layers = model.moe_layers()
    if lora is not None:
        check_targets(model, lora, module_names(model))
    try:
        for projection, format in stored_projections(model, dense):
            # A model in bfloat16 holds them in bfloat16 anyway.
            exact = dense is None and dtype != jnp.bfloat16
            _store_projection(weights, projection, format, exact)
        for name, variable, transpose in _dense_tensors(model):
            _assign(weights, name, variable, transpose)
        # What was read, and what was made of it on the way, would stay resident while
        # experts come: of Qwen3-30B-A3B 4 GB.
        weights.release_pages()
        backend.trim_memory()
        for index, layer in _counted(layers):
            kwargs: dict[str, Any] = {"rngs": rngs}
            if lora is not None and lora.adapts(experts_name(index)):
                own = lora.of_module(experts_name(index))
                # The module scales by alpha / rank, rsLoRA by something else.
                kwargs |= {"lora_rank": own.rank, "lora_alpha": own.scaling * own.rank}
                kwargs |= {"dropout": own.dropout}
            stored = weights.experts(index, config.num_experts)
            _check_experts(path, index, config, stored.shape)
            if experts == "reference":
                layer.experts = ReferenceExperts(*stored.dequantize(), **kwargs)
                continue
            kept = [encoding.format for encoding in stored.encodings]
            if experts == "auto":
                check_compute(compute, kept, where=f"{path}: layer {index}")
            store = make_store(
                stored,
                kept if experts == "auto" else [experts],
                group_size,
                zero_point,
                where=str(path),
            )
            del stored  # or there would be two layers' while the next is read
            layer.experts = RoutedExperts(
                store,
                activation_policy=activation_policy,
                compute=compute,
                **kwargs,
            )
            weights.release_pages()
        if lora is not None:
            # After the experts, whose start does not depend on what else is trained.
            adapt_projections(model, lora, rngs)
        backend.trim_memory()
    except BaseException:
        model.close()
        raise
    return model


def shapes_of(config: ModelConfig, *, dtype: Any, remat: bool = False) -> Decoder:
    """A model whose arrays are shapes alone, and that has no experts yet."""
    return nnx.eval_shape(
        lambda: Decoder(
            config, lambda _: _Unloaded(), dtype=dtype, remat=remat, rngs=nnx.Rngs(0)
        )
    )


def module_names(model: Decoder) -> list[str]:
    """The names of all modules outside the experts that have weights of their own."""
    family = model.config.model_type
    tensors = (family_name(name, family) for name, _, _ in _dense_tensors(model))
    return list(dict.fromkeys(name.rpartition(".")[0] for name in tensors))


def _counted(layers: Sequence[Any]) -> Iterator[Any]:
    """The layers, with a progress bar on a terminal while there are more to come."""
    console = Console(stderr=True)
    yield from track(
        layers,
        description="loading experts",
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def _dense_tensors(model: Decoder) -> Iterator[tuple[str, Any, bool]]:
    """The usual name of each dense parameter, and whether it is transposed.

    Linear layers are `[out, in]` in Hugging Face's files and `[in, out]` in flax.
    """
    yield "model.embed_tokens.weight", model.embed.embedding, False
    yield from _part_tensors("model.norm", model.norm)
    if model.head is not None:
        yield from _part_tensors("lm_head", model.head)
    for index, layer in enumerate(model.layers):
        yield from _layer_tensors(f"model.layers.{index}", layer)


# Weights from which on a store is faster. A call costs 3 microseconds more than one of
# XLA's own products, as much as 256 x 256 weights take for a single row.
_LEAST_STORED = 1 << 16

# Of arrays that XLA:CPU can use where they are.
_ALIGNMENT = 64

# Bytes of a tensor after which what was read of the file is given back at once.
_LARGE = 64 << 20

# Parts whose matrix is used otherwise than in a product with their input.
_NO_PRODUCTS = ("kv_b_proj",)


def stored_projections(
    model: Decoder, dense: str | None
) -> list[tuple[Projection, str]]:
    """What goes into stores, and in which format.

    With `dense` None those for which a store in bfloat16 is faster, if no value changes
    by it. In a program for an accelerator none is: operands would go to the host.
    """
    if dense is None and jax.default_backend() != "cpu":
        dense = "xla"
    if dense == "xla":
        return []
    return [
        (projection, dense or "bf16")
        for projection in projections(model)
        if projection.part not in _NO_PRODUCTS
        and (dense is not None or projection.module.kernel.size >= _LEAST_STORED)
    ]


def _store_projection(
    weights: Weights, projection: Projection, format: str, exact: bool
) -> None:
    """Put one projection into a store; `exact`: only if bfloat16 has its values."""
    module = projection.module
    name = f"{projection.usual}.weight"
    tensor = _read(weights, name, module.kernel.shape[::-1])
    if exact and not _is_bfloat16(tensor):
        return
    try:
        store = LinearStore.from_array(tensor, format=format)
    except ValueError as error:
        where = f"{weights.path}: {weights.name_of(name)}"
        raise ValueError(f"{where}: {error}") from None
    setattr(projection.owner, projection.part, FrozenLinear(store, module.bias))
    if tensor.nbytes >= _LARGE:
        weights.release_pages()


def _is_bfloat16(tensor: np.ndarray[Any, Any]) -> bool:
    """Whether every value is a bfloat16 number."""
    if tensor.dtype == jnp.bfloat16:
        return True
    # The bits that bfloat16 lacks; NaNs keep their payloads, which nobody reads.
    bits = np.ascontiguousarray(tensor).view(np.uint32)
    return not np.bitwise_or.reduce(bits, axis=None) & 0xFFFF


def _layer_tensors(at: str, layer: DecoderLayer) -> Iterator[tuple[str, Any, bool]]:
    mlp = layer.mlp
    yield from _part_tensors(f"{at}.input_layernorm", layer.input_norm)
    yield from _part_tensors(
        f"{at}.post_attention_layernorm", layer.post_attention_norm
    )
    yield from _children_tensors(f"{at}.self_attn", layer.attention)
    if isinstance(mlp, GatedMLP):
        yield from _children_tensors(f"{at}.mlp", mlp)
        return
    yield from _part_tensors(f"{at}.mlp.gate", mlp.router.gate)
    if mlp.router.bias is not None:
        yield f"{at}.mlp.gate.e_score_correction_bias", mlp.router.bias, False
    if mlp.shared_experts is not None:
        yield from _children_tensors(f"{at}.mlp.shared_experts", mlp.shared_experts)
    if mlp.shared_gate is not None:
        yield from _part_tensors(f"{at}.mlp.shared_experts_gate", mlp.shared_gate)


def _children_tensors(at: str, module: nnx.Module) -> Iterator[tuple[str, Any, bool]]:
    """Of a module whose parts are named as in the file."""
    for name, part in vars(module).items():
        if isinstance(part, nnx.Linear | nnx.RMSNorm | FrozenLinear):
            yield from _part_tensors(f"{at}.{name}", part)


def _part_tensors(
    at: str, part: nnx.Linear | nnx.RMSNorm | FrozenLinear
) -> Iterator[tuple[str, Any, bool]]:
    if isinstance(part, nnx.RMSNorm):
        yield f"{at}.weight", part.scale, False
        return
    if isinstance(part, nnx.Linear):  # a FrozenLinear has its weights already
        yield f"{at}.weight", part.kernel, True
    if part.bias is not None:
        yield f"{at}.bias", part.bias, False


def _read(
    weights: Weights, name: str, expected: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    """A dense tensor of the shape that the configuration asks for."""
    tensor = weights.read(name)
    if tensor.shape != expected:
        raise ValueError(
            f"{weights.path}: {weights.name_of(name)} has shape {list(tensor.shape)}, "
            f"the configuration asks for {list(expected)}"
        )
    if tensor.dtype.name not in ("bfloat16", "float32"):
        raise ValueError(
            f"{weights.path}: {weights.name_of(name)} has dtype {tensor.dtype}, "
            "expected bfloat16 or float32"
        )
    return tensor


def _assign(
    weights: Weights, name: str, variable: nnx.Variable, transpose: bool
) -> None:
    expected = variable.shape[::-1] if transpose else variable.shape
    tensor = _read(weights, name, expected)
    value = tensor.T if transpose else tensor
    variable.set_value(jax.device_put(_copy(value, variable.dtype)))
    if value.nbytes >= _LARGE:
        weights.release_pages()
        backend.trim_memory()


def _copy(value: np.ndarray[Any, Any], dtype: Any) -> np.ndarray[Any, Any]:
    """A copy in `dtype` that JAX takes as it is, for which it must be aligned.

    An array that aliased the file would fault in its pages later, and change if the
    file did; one that JAX copied again would take twice the memory for a while.
    """
    size = value.size * np.dtype(dtype).itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    copy = raw[start : start + size].view(dtype).reshape(value.shape)
    copy[...] = value
    return copy


def _check_experts(
    path: str | os.PathLike[str],
    index: int,
    config: ModelConfig,
    shape: tuple[int, ...],
) -> None:
    expected = (config.num_experts, config.moe_intermediate_size, config.hidden_size)
    if shape != expected:
        raise ValueError(
            f"{path}: the experts' gate of layer {index} is {list(shape)}, the "
            f"configuration asks for {list(expected)}"
        )
