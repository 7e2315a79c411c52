"""A model whose experts are in a storage format, as a new Hugging Face directory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ktjax.experts_load import encode_experts
from ktjax.io.adapters.names import stored_target_of
from ktjax.io.atomic import new_directory, new_file
from ktjax.io.converted import layer_file, write_layer
from ktjax.io.experts import experts_of, read_experts
from ktjax.io.header import CheckpointError, Entry
from ktjax.io.safetensors import INDEX_NAME, Checkpoint, SafetensorsFile
from ktjax.io.stream import Spec, copy_other_files, read_pieces, save_stream


def convert_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    format: str,
    group_size: int | None = None,
    zero_point: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[int, int]:
    """Write `model` with its routed experts converted as the directory `out`.

    Every layer's experts become a file (`ktjax.io.converted`) that loads without a
    conversion, with the same bits as `model` would in that format. All other tensors
    and files are copied, so `out` is a whole model. One layer's experts are in memory
    at a time. `out` appears when it is complete.

    Args:
      model: a Hugging Face directory, or a safetensors file.
      out: the directory to make.
      format: storage format of the experts, a name in `ktjax.quant.FORMATS`.
      group_size: for int4_kgroup, see `ktjax.quant.encode`; None = what the experts
        have, or else 128.
      zero_point: for int4_kgroup, see `ktjax.quant.encode`.
      on_progress: called with bytes of `model` done and in all.

    Returns:
      Layer -> its number of experts.

    Raises:
      FileNotFoundError: `model`, or a shard of it, is not there.
      FileExistsError: `out` exists.
      CheckpointError: a damaged file, or no experts.
      ValueError: an option that the format does not have, or weights that cannot be
        quantised; names the layer.
    """
    source = Path(model)
    checkpoint = Checkpoint(source)
    layers = experts_of(checkpoint)
    if not layers:
        raise CheckpointError(f"{source}: no layer has routed experts to convert")
    sizes = dict.fromkeys(layers, 0)
    rest: dict[SafetensorsFile, list[str]] = {}
    for name in checkpoint:
        shard = checkpoint.file_of(name)
        if target := stored_target_of(name):
            sizes[target.layer] += _size(shard.entries[name])
        else:
            rest.setdefault(shard, []).append(name)
    total = sum(
        _size(shard.entries[name]) for shard, names in rest.items() for name in names
    )
    total += sum(sizes.values())
    done = 0

    def advance(size: int) -> None:
        nonlocal done
        done += size
        on_progress(done, total)

    weight_map: dict[str, str] = {}
    with new_directory(Path(out)) as directory:
        if source.is_dir():
            copy_other_files(source, directory)

        # A function, so that nothing of a layer outlives it.
        def convert_layer(layer: int, path: Path) -> list[str]:
            weights = encode_experts(
                read_experts(checkpoint, layer, layers[layer]),
                [format],
                group_size,
                zero_point,
                where=f"convert: layer {layer}",
            )
            return write_layer(path, layer, weights.encoding, weights.arrays())

        for layer in layers:
            file = layer_file(layer)
            names = convert_layer(layer, directory / file)
            weight_map |= dict.fromkeys(names, file)
            advance(sizes[layer])
        for number, (shard, names) in enumerate(rest.items()):
            file = f"rest-{number:05d}.safetensors"
            _copy_tensors(shard, names, directory / file, advance)
            weight_map |= dict.fromkeys(names, file)
        with new_file(directory / INDEX_NAME) as index:
            index.write(json.dumps({"weight_map": weight_map}, indent=1).encode())
        # Reads every header again, and holds the index against the files.
        if experts_of(Checkpoint(directory)) != layers:
            raise CheckpointError(f"{out}: what was written differs from {source}")
    return layers


def _size(entry: Entry) -> int:
    return entry.stop - entry.start


def _copy_tensors(
    shard: SafetensorsFile, names: list[str], out: Path, advance: Callable[[int], None]
) -> None:
    entries = shard.entries
    # In the order of the data, so that the file is read from front to back.
    names = sorted(names, key=lambda name: (entries[name].start, entries[name].stop))

    def pieces(name: str) -> Iterator[np.ndarray[Any, Any]]:
        entry = entries[name]
        for piece in read_pieces(shard, entry, 0, math.prod(entry.shape)):
            yield piece
            advance(piece.nbytes)

    specs = {name: Spec(entries[name].dtype, entries[name].shape) for name in names}
    save_stream(out, specs, pieces, shard.metadata)
