"""Converted experts on disk: the plain arrays of a storage format, a file for a layer.

A file is safetensors. It has, of each plain array (see `ktjax.Quantized`) of gate, up
and down, one tensor with all experts,

    model.layers.L.mlp.experts.{gate,up,down}_proj.{values,scales,zeros}

and in the header's metadata

| key | |
|---|---|
| ktjax_experts | version of this layout, "1" |
| encoding | name of the format |
| group_size, zero_point | its options: a number; "true" or "false" |
| source | what the experts were made from, or "" |

Nothing in it depends on the machine, on sub-pools or on kernels. The arrays are aligned
to their dtype and are read where they lie, through a mapping.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ktjax.io.header import CheckpointError
from ktjax.io.safetensors import Checkpoint
from ktjax.io.stream import Spec, save_stream
from ktjax.quant import Encoding, Quantized

Array = np.ndarray[Any, Any]

VERSION = "1"
NAMES = ("gate_proj", "up_proj", "down_proj")


def layer_file(layer_idx: int) -> str:
    """The name of a layer's file."""
    return f"experts-{layer_idx:05d}.safetensors"


def _folder(layer_idx: int) -> str:
    return f"model.layers.{layer_idx}.mlp.experts"


def write_layer(
    path: Path,
    layer_idx: int,
    encoding: Encoding,
    matrices: Sequence[Array | Quantized],
    source: str = "",
) -> list[str]:
    """Write the experts of a layer; a reader sees the whole file or none.

    Args:
      path: the file to write; its directory must exist.
      layer_idx: the layer.
      encoding: the storage format.
      matrices: gate, up and down in it: `Quantized`, or bfloat16 arrays for "bf16".
      source: what they were made from; kept in the file.

    Returns:
      The names of the tensors.
    """
    arrays: dict[str, Array] = {}
    for name, matrix in zip(NAMES, matrices, strict=True):
        plain = matrix if isinstance(matrix, Quantized) else Quantized(matrix, None)
        for part, array in plain._asdict().items():
            if array is not None:
                arrays[f"{_folder(layer_idx)}.{name}.{part}"] = np.asarray(array)
    # Wide dtypes first, so that every array is aligned to its dtype.
    names = sorted(arrays, key=lambda name: -arrays[name].dtype.itemsize)
    specs = {name: Spec(arrays[name].dtype, arrays[name].shape) for name in names}

    def experts(name: str) -> Iterator[Array]:
        yield from arrays[name]

    metadata = {
        "ktjax_experts": VERSION,
        "encoding": encoding.format,
        "group_size": str(encoding.group_size),
        "zero_point": str(encoding.zero_point).lower(),
        "source": source,
    }
    save_stream(path, specs, experts, metadata)
    return names


def has_converted(checkpoint: Checkpoint, layer_idx: int) -> bool:
    """Whether the experts of the layer are there in this layout."""
    return f"{_folder(layer_idx)}.{NAMES[0]}.values" in checkpoint


def read_converted(
    checkpoint: Checkpoint, layer_idx: int, num_experts: int
) -> tuple[Encoding, list[Array | Quantized]]:
    """The format of a layer, and gate, up and down as views of the file.

    Raises:
      CheckpointError: another version, or arrays that do not fit the format, each other
        or `num_experts`; names the tensor.
      KeyError: a tensor is missing.
    """
    at = _folder(layer_idx)
    encoding = _encoding(checkpoint, layer_idx)
    values = [checkpoint[f"{at}.{name}.values"] for name in NAMES]
    for name, array in zip(NAMES, values, strict=True):
        if array.ndim != 3 or len(array) != num_experts:
            raise CheckpointError(
                f"{checkpoint.path}: {at}.{name}.values: expected [{num_experts}, "
                f"outputs, depth], got {list(array.shape)}"
            )
    # The depth of a matrix is the outputs of another: packed codes leave it open.
    intermediate, hidden = values[0].shape[1], values[2].shape[1]
    sizes = ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate))
    matrices = [
        _read_matrix(checkpoint, f"{at}.{name}", encoding, num_experts, *size)
        for name, size in zip(NAMES, sizes, strict=True)
    ]
    return encoding, matrices


def source_of(checkpoint: Checkpoint, layer_idx: int) -> str:
    """What the converted experts of a layer were made from, or ""."""
    return _metadata(checkpoint, layer_idx).get("source", "")


def fingerprint(checkpoint: Checkpoint) -> str:
    """A name of this state of a checkpoint: its files, their sizes and times."""
    paths = {checkpoint.file_of(name).path for name in checkpoint}
    facts = []
    for path in sorted(paths):
        status = path.stat()
        facts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()


def _metadata(checkpoint: Checkpoint, layer_idx: int) -> dict[str, str]:
    return checkpoint.file_of(f"{_folder(layer_idx)}.{NAMES[0]}.values").metadata


def _encoding(checkpoint: Checkpoint, layer_idx: int) -> Encoding:
    metadata = _metadata(checkpoint, layer_idx)
    where = f"{checkpoint.path}: converted experts of layer {layer_idx}"
    if (version := metadata.get("ktjax_experts")) != VERSION:
        raise CheckpointError(
            f"{where}: expected version {VERSION!r} of their layout, got {version!r}; "
            "convert the checkpoint again"
        )
    try:
        group = int(metadata["group_size"])
        zero_point = {"false": False, "true": True}[metadata["zero_point"]]
        return Encoding.of(
            metadata["encoding"], group or None, zero_point, where="encoding"
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{where}: their metadata names no storage format ({error}); convert the "
            "checkpoint again"
        ) from None


def _read_matrix(
    checkpoint: Checkpoint,
    at: str,
    encoding: Encoding,
    experts: int,
    outputs: int,
    depth: int,
) -> Array | Quantized:
    arrays = {}
    for part, (shape, dtype) in encoding.shapes(outputs, depth).items():
        array = checkpoint[f"{at}.{part}"]
        expected = (experts, *shape)
        if array.dtype != dtype or array.shape != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {at}.{part}: expected {dtype}{list(expected)} in "
                f"format {encoding.format!r}, got {array.dtype}{list(array.shape)}"
            )
        arrays[part] = array
    return Quantized(**arrays) if encoding.spec.scale else arrays["values"]
