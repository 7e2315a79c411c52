"""A model with an adapter merged into its weights, as a new Hugging Face directory.

Every shard of the model becomes one of the same name with the same tensors. An expert's
matrix is read, changed and written before the next one is read, so memory does not
grow with the model.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ktjax.io.adapters.adapter import Adapter
from ktjax.io.adapters.names import PARTS, Target, target_of
from ktjax.io.atomic import new_directory
from ktjax.io.gguf import is_gguf
from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint, SafetensorsFile
from ktjax.io.stream import Spec, copy_other_files, read_pieces, save_stream
from ktjax.lora import LoRA

Array = np.ndarray[Any, Any]

_DTYPES = ("float16", "bfloat16", "float32")


def merge_checkpoint(
    model: str | os.PathLike[str],
    adapter: Adapter,
    out: str | os.PathLike[str],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `model` with `adapter` merged as the directory `out`.

    A weight with an adapter becomes W + s B A, computed in float32 and rounded once to
    the dtype of W. Other tensors, and files beside the weights (configuration,
    tokenizer), are copied. `out` appears when it is complete.

    Args:
      model: a Hugging Face directory with (sharded) safetensors in float16, bfloat16 or
        float32; per-expert tensors or fused ones.
      adapter: what to merge; of every layer whose experts it has, all experts.
      out: the directory to make.
      on_progress: called with bytes written and bytes in all.

    Raises:
      FileNotFoundError: `model`, or a shard of it, is not there.
      FileExistsError: `out` exists.
      CheckpointError: a damaged file, a quantised model, or an adapter that does not
        fit it; names the tensor.
    """
    source = Path(model)
    if is_gguf(source):
        raise CheckpointError(
            f"{source}: GGUF files are not merged into, safetensors are; merge into "
            "the model that it was made from, or keep the adapter beside it"
        )
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such directory; expected a model's, with safetensors"
        )
    _refuse_quantised(source)
    checkpoint = Checkpoint(source)
    shards = list({id(f): f for f in map(checkpoint.file_of, checkpoint)}.values())
    _check_projections(checkpoint, adapter)
    _check_experts(checkpoint, adapter)
    total = sum(_size(shard) for shard in shards)
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        on_progress(done, total)

    with new_directory(Path(out)) as directory:
        copy_other_files(source, directory)
        for shard in shards:
            _merge_shard(shard, adapter, directory / shard.path.name, advance)
        # Reads every header again, and holds the index against the shards.
        if set(Checkpoint(directory)) != set(checkpoint):
            raise CheckpointError(f"{out}: the written shards differ from {source}'s")


def _refuse_quantised(source: Path) -> None:
    file = source / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{file}: no such file; expected a Hugging Face model directory"
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if isinstance(config, dict) and config.get("quantization_config") is not None:
        raise CheckpointError(
            f"{file}: the model is quantised (quantization_config); merging needs "
            "weights in float16, bfloat16 or float32. Merge into the model that it was "
            "made from, or keep the adapter beside it"
        )


def _check_projections(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Every projection that the adapter changes is there with the right shape."""
    for name, lora in adapter.projections.items():
        weight = f"{name}.weight"
        if weight not in checkpoint:
            raise CheckpointError(
                f"{checkpoint.path}: {weight}, which the adapter changes, is not there"
            )
        _check_dtype(checkpoint, weight)
        entry = checkpoint.file_of(weight).entries[weight]
        expected = (lora.b.shape[0], lora.a.shape[1])
        if entry.shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {weight} has shape {list(entry.shape)}, the "
                f"adapter is for {list(expected)}"
            )


def _check_experts(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Every expert of the adapter's layers is there once, with the right shape."""
    found: dict[int, set[tuple[str, int]]] = {index: set() for index in adapter.layers}
    for name in checkpoint:
        target = target_of(name)
        if target is None or target.layer not in adapter.layers:
            continue
        lora = adapter.layers[target.layer]
        experts = lora.gate_a.shape[0]
        entry = checkpoint.file_of(name).entries[name]
        _check_dtype(checkpoint, name)
        shape = _matrix_shape(lora, target)
        expected = shape if target.expert is not None else (experts, *shape)
        if entry.shape != expected or (target.expert or 0) >= experts:
            raise CheckpointError(
                f"{checkpoint.path}: {name} has shape {list(entry.shape)}, the adapter "
                f"is for {experts} experts with {list(expected)}"
            )
        which = range(experts) if target.expert is None else (target.expert,)
        pairs = {(part, expert) for part in target.parts for expert in which}
        if found[target.layer] & pairs:
            raise CheckpointError(
                f"{checkpoint.path}: {name} holds experts that another tensor holds too"
            )
        found[target.layer] |= pairs
    for index, lora in adapter.layers.items():
        for expert in range(lora.gate_a.shape[0]):
            for part in PARTS:
                if (part, expert) not in found[index]:
                    raise CheckpointError(
                        f"{checkpoint.path}: the {part} projection of expert {expert} "
                        f"of layer {index}, which the adapter changes, is not there"
                    )


def _check_dtype(checkpoint: Checkpoint, name: str) -> None:
    dtype = checkpoint.file_of(name).entries[name].dtype
    if dtype.name not in _DTYPES:
        raise CheckpointError(
            f"{checkpoint.path}: {name} has dtype {dtype}; merging needs one of "
            f"{', '.join(_DTYPES)}"
        )


def _matrix_shape(lora: LoRA, target: Target) -> tuple[int, int]:
    rows = sum(getattr(lora, f"{part}_b").shape[1] for part in target.parts)
    return rows, getattr(lora, f"{target.parts[0]}_a").shape[2]


def _size(shard: SafetensorsFile) -> int:
    return sum(entry.stop - entry.start for entry in shard.entries.values())


def _merge_shard(
    shard: SafetensorsFile, adapter: Adapter, out: Path, advance: Callable[[int], None]
) -> None:
    entries = shard.entries
    # In the order of the data, so that the file is read from front to back.
    names = sorted(entries, key=lambda name: (entries[name].start, entries[name].stop))
    specs = {name: Spec(entries[name].dtype, entries[name].shape) for name in names}

    def pieces(name: str) -> Iterator[Array]:
        for piece in _pieces(shard, name, adapter):
            yield piece
            advance(piece.nbytes)

    save_stream(out, specs, pieces, shard.metadata)


def _pieces(shard: SafetensorsFile, name: str, adapter: Adapter) -> Iterator[Array]:
    """The tensor `name` of `shard`, merged if the adapter changes it."""
    entry, target = shard.entries[name], target_of(name)
    module = name.removesuffix(".weight")
    if module != name and module in adapter.projections:
        lora = adapter.projections[module]
        delta = _product(lora.a, lora.b, adapter.strength(module).scaling)
        yield _add(shard, name, 0, delta, "")
    elif target is not None and target.layer in adapter.layers:
        scaling = adapter.strength(target.layer).scaling
        yield from _merged(shard, name, adapter.layers[target.layer], target, scaling)
    else:
        yield from read_pieces(shard, entry, 0, math.prod(entry.shape))


def _merged(
    shard: SafetensorsFile, name: str, lora: LoRA, target: Target, scaling: float
) -> Iterator[Array]:
    """The merged tensor `name`, expert by expert."""
    which = [target.expert]
    if target.expert is None:
        which = list(range(shard.entries[name].shape[0]))
    for place, expert in enumerate(which):
        deltas = [
            _product(
                getattr(lora, f"{part}_a")[expert],
                getattr(lora, f"{part}_b")[expert],
                scaling,
            )
            for part in target.parts
        ]
        delta = np.concatenate(deltas)
        yield _add(shard, name, place * delta.size, delta, f" of expert {expert}")


def _add(
    shard: SafetensorsFile, name: str, first: int, delta: Array, which: str
) -> Array:
    """The matrix from value `first` of a tensor on, plus `delta`."""
    entry = shard.entries[name]
    parts = list(read_pieces(shard, entry, first, first + delta.size))
    weight = np.concatenate(parts).reshape(delta.shape).astype(np.float32)
    weight += delta
    with np.errstate(over="ignore"):
        merged = weight.astype(entry.dtype)
    if not np.isfinite(merged).all():
        raise CheckpointError(
            f"{shard.path}: {name}{which} plus the adapter is not finite in "
            f"{entry.dtype}"
        )
    return merged


def _product(a: Array, b: Array, scaling: float) -> Array:
    """s B A in float32."""
    with np.errstate(over="ignore"):  # what is not finite is an error later
        return np.float32(scaling) * (b.astype(np.float32) @ a.astype(np.float32))
