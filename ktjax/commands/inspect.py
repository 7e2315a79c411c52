"""What a directory holds, from headers and configurations alone."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ktjax.commands.config import InspectConfig
from ktjax.io.adapters import inspect_adapter, is_adapter, ranges
from ktjax.io.adapters.names import stored_target_of
from ktjax.io.gguf import GGUFCheckpoint, is_gguf
from ktjax.io.gguf_experts import EXPERTS
from ktjax.io.gguf_header import Descriptor
from ktjax.io.header import CheckpointError, Entry
from ktjax.io.safetensors import Checkpoint, SafetensorsFile
from ktjax.train import checkpoint
from ktjax.train.adapters import is_run, run_checkpoint
from ktjax.train.report import bytes_text

Rows = list[tuple[str, str]]

# Experts' counts under the names that families give them.
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")


def run_inspect(config: InspectConfig, console: Console) -> None:
    """Show on `console` what is at the path.

    Raises:
      CheckpointError, AdapterError, FileNotFoundError: a damaged file, or nothing that
      is known.
    """
    path = config.path
    if is_run(path):
        rows = _run(path)
    elif is_adapter(path):
        rows = _adapter(path)
    elif is_gguf(path):
        rows = _gguf(path)
    else:
        rows = _checkpoint(path)
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False, markup=False)


def _adapter(path: Path) -> Rows:
    info = inspect_adapter(path)
    return [
        ("adapter", str(path)),
        ("layout", info.layout),
        ("rank", str(info.rank)),
        ("alpha", f"{info.alpha:g} (scaling {info.alpha / info.rank:g})"),
        ("targets", ", ".join(info.targets)),
        ("experts in", f"layers {ranges(info.layers)}" if info.layers else "no layer"),
        ("parameters", f"{info.parameters:,}"),
        ("dtypes", ", ".join(info.dtypes)),
        ("size", bytes_text(info.size)),
        ("base model", info.base_model or "not said"),
    ]


def _run(path: Path) -> Rows:
    chosen = run_checkpoint(path)
    meta = checkpoint.read_meta(chosen)
    config = meta.get("config", {})
    entries = SafetensorsFile(chosen / "lora.safetensors").entries
    return [
        ("training", str(path)),
        ("checkpoint", f"{chosen.name}, after step {meta.get('step')}"),
        ("rank", str(config.get("lora_rank"))),
        ("alpha", str(config.get("lora_alpha"))),
        *_own_ranks(config),
        ("tensors", str(len(entries))),
        ("dtypes", _dtypes(entries)),
        ("size", bytes_text(sum(map(_size, entries.values())))),
        ("base model", str(meta.get("model"))),
    ]


def _own_ranks(config: dict[str, Any]) -> Rows:
    rows = [("targets", str(config.get("targets", "experts")))]
    rows += [("rsLoRA", "alpha / √rank")] if config.get("rslora") else []
    patterns = config.get("rank_pattern", {})
    return [*rows, *((f"rank of {key}", str(rank)) for key, rank in patterns.items())]


def _checkpoint(path: Path) -> Rows:
    files = Checkpoint(path)
    entries = {name: files.file_of(name).entries[name] for name in files}
    config = _config(path)
    experts, layers = _experts(entries)
    rows = [("checkpoint", str(path))]
    if config:
        counts = [str(config[key]) for key in _EXPERT_KEYS if key in config]
        rows += [
            ("family", str(config.get("model_type", "not said"))),
            ("layers", str(config.get("num_hidden_layers", "not said"))),
            ("experts", ", ".join(counts[:1]) or "none"),
            ("per token", str(config.get("num_experts_per_tok", "not said"))),
        ]
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method", "not said")
            rows.append(("quantised", str(method)))
    routed = sum(map(_size, experts.values()))
    rows += [
        ("experts in", f"layers {ranges(layers)}" if layers else "no layer"),
        ("tensors", f"{len(entries):,} in {len({*map(files.file_of, files)})} files"),
        ("routed experts", f"{bytes_text(routed)}, {_dtypes(experts)}"),
    ]
    rest = {name: entry for name, entry in entries.items() if name not in experts}
    size = sum(map(_size, rest.values()))
    return [*rows, ("the rest", f"{bytes_text(size)}, {_dtypes(rest)}")]


def _gguf(path: Path) -> Rows:
    files = GGUFCheckpoint(path)
    tensors = {name: files.descriptor(name) for name in files}
    architecture = files.metadata.get("general.architecture", "not said")
    keys = ("block_count", "expert_count", "expert_used_count")
    layers, count, used = (
        str(files.metadata.get(f"{architecture}.{key}", "not said")) for key in keys
    )
    routed = {name: t for name, t in tensors.items() if EXPERTS.fullmatch(name)}
    rest = {name: t for name, t in tensors.items() if name not in routed}
    found = {int(name.split(".")[1]) for name in routed}
    return [
        ("GGUF", str(path)),
        ("name", str(files.metadata.get("general.name", "not said"))),
        ("family", str(architecture)),
        ("layers", layers),
        ("experts", count),
        ("per token", used),
        ("experts in", f"layers {ranges(found)}" if found else "no layer"),
        ("tensors", f"{len(tensors):,} in {len({*map(files.file_of, files)})} files"),
        ("routed experts", _size_and_types(routed)),
        ("the rest", _size_and_types(rest)),
    ]


def _size_and_types(tensors: Mapping[str, Descriptor]) -> str:
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.type.name] += tensor.stop - tensor.start
    types = ", ".join(name for name, _ in counts.most_common()) or "none"
    return f"{bytes_text(counts.total())}, {types}"


def _experts(entries: dict[str, Entry]) -> tuple[dict[str, Entry], set[int]]:
    """The tensors of routed experts, scales of quantised ones too, and their layers."""
    found, layers = {}, set()
    for name, entry in entries.items():
        target = stored_target_of(name)
        if target is not None:
            found[name] = entry
            layers.add(target.layer)
    return found, layers


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return config


def _dtypes(entries: Mapping[str, Entry]) -> str:
    counts: Counter[str] = Counter()
    for entry in entries.values():
        counts[str(entry.dtype)] += _size(entry)
    return ", ".join(name for name, _ in counts.most_common()) or "none"


def _size(entry: Entry) -> int:
    return entry.stop - entry.start
