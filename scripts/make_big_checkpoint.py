"""Write a checkpoint of random weights in a large model's true sizes.

    python scripts/make_big_checkpoint.py --out DIR             # Qwen3-30B-A3B, 19 GB
    python scripts/make_big_checkpoint.py --out DIR --layers 2  # a part of it

For measurements: what loads and trains is as large as the real model, and learns
nothing. Experts are in compressed-tensors INT4 (groups of 32, as Kimi-K2's) or in BF16,
everything else in BF16; the tokenizer is the demo model's. One layer is in memory at a
time and becomes one file; a run that was cut off goes on with the files that lack.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from rich.progress import track

from ktjax import assets
from ktjax.io.atomic import new_file
from ktjax.io.safetensors import INDEX_NAME
from ktjax.io.stream import Spec, save_stream

sys.path.insert(0, str(Path(__file__).resolve().parent))
from qwen3_moe import Sizes

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP = 32
# Standard deviation of the weights, as Hugging Face initialises such models.
STD = 0.02
# Of the codes -8 to 7, all as likely.
CODE_STD = 21.25**0.5
# Values that are made at a time.
PIECE = 1 << 24

Array = np.ndarray[Any, Any]


QWEN3_30B_A3B = Sizes(
    layers=48,
    experts=128,
    experts_per_token=8,
    hidden=2048,
    intermediate=768,
    heads=32,
    kv_heads=4,
    head_dim=128,
    vocab=151936,
)


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in a checkpoint of these sizes, experts in format "int4" or "bf16"."""

    sizes: Sizes
    format: str

    def config(self) -> dict[str, Any]:
        """config.json."""
        config = self.sizes.config(
            positions=40960,
            theta=1e6,
            eps=1e-6,
            eos=5,  # the demo's tokenizer's
            pad=0,
        )
        if self.format == "int4":
            config["quantization_config"] = {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "ignore": ["lm_head", "re:.*self_attn.*", "re:.*mlp.gate$"],
                "config_groups": {
                    "group_0": {
                        "targets": ["Linear"],
                        "weights": {
                            "num_bits": 4,
                            "group_size": GROUP,
                            "strategy": "group",
                            "symmetric": True,
                            "type": "int",
                        },
                    }
                },
            }
        return config

    def matrices(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what is dense in a layer."""
        sizes = self.sizes
        at = f"model.layers.{layer}"
        queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
        return {
            f"{at}.input_layernorm.weight": (sizes.hidden,),
            f"{at}.post_attention_layernorm.weight": (sizes.hidden,),
            f"{at}.self_attn.q_norm.weight": (sizes.head_dim,),
            f"{at}.self_attn.k_norm.weight": (sizes.head_dim,),
            f"{at}.self_attn.q_proj.weight": (queries, sizes.hidden),
            f"{at}.self_attn.k_proj.weight": (keys, sizes.hidden),
            f"{at}.self_attn.v_proj.weight": (keys, sizes.hidden),
            f"{at}.self_attn.o_proj.weight": (sizes.hidden, queries),
            f"{at}.mlp.gate.weight": (sizes.experts, sizes.hidden),
        }

    def around(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is no layer's."""
        sizes = self.sizes
        return {
            "model.embed_tokens.weight": (sizes.vocab, sizes.hidden),
            "model.norm.weight": (sizes.hidden,),
            "lm_head.weight": (sizes.vocab, sizes.hidden),
        }

    def expert_matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """Shapes of the experts' projections, named without `.weight`."""
        sizes = self.sizes
        wide, tall = (
            (sizes.intermediate, sizes.hidden),
            (sizes.hidden, sizes.intermediate),
        )
        return {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}": shape
            for expert in range(sizes.experts)
            for name, shape in (
                ("gate_proj", wide),
                ("up_proj", wide),
                ("down_proj", tall),
            )
        }

    def specs(self, layer: int | None) -> dict[str, Spec]:
        """What is in the file of a layer, or in that of the rest (None)."""
        dense = self.around() if layer is None else self.matrices(layer)
        specs = {name: Spec(BF16, shape) for name, shape in dense.items()}
        if layer is None:
            return specs
        for at, (outputs, depth) in self.expert_matrices(layer).items():
            if self.format == "bf16":
                specs[f"{at}.weight"] = Spec(BF16, (outputs, depth))
                continue
            specs[f"{at}.weight_packed"] = Spec(
                np.dtype(np.int32), (outputs, depth // 8)
            )
            specs[f"{at}.weight_scale"] = Spec(BF16, (outputs, depth // GROUP))
            specs[f"{at}.weight_shape"] = Spec(np.dtype(np.int64), (2,))
        return specs


def pieces_of(
    name: str, spec: Spec, true_shapes: dict[str, Any], rng: np.random.Generator
) -> Iterator[Array]:
    """Random values of one tensor, a part of a large one at a time."""
    if name.endswith("norm.weight"):
        yield np.ones(spec.shape, BF16)
    elif name.endswith(".weight_shape"):
        yield np.array(true_shapes[name.removesuffix(".weight_shape")], np.int64)
    elif name.endswith(".weight_packed"):
        yield rng.integers(-(1 << 31), 1 << 31, spec.shape, np.int32)
    elif name.endswith(".weight_scale"):
        yield (rng.uniform(0.5, 1.5, spec.shape) * (STD / CODE_STD)).astype(BF16)
    else:
        size = math.prod(spec.shape)
        for start in range(0, size, PIECE):
            # Uniform numbers of the same deviation cost a third of normal ones.
            spread = rng.random(min(PIECE, size - start), np.float32)
            yield ((spread - np.float32(0.5)) * np.float32(STD * 12**0.5)).astype(BF16)


def write_shard(path: Path, contents: Contents, layer: int | None, seed: int) -> None:
    """One file, complete or not there."""
    number = contents.sizes.layers if layer is None else layer
    rng = np.random.default_rng([seed, number])
    specs = contents.specs(layer)
    true_shapes = {} if layer is None else contents.expert_matrices(layer)

    def pieces(name: str) -> Iterator[Array]:
        return pieces_of(name, specs[name], true_shapes, rng)

    save_stream(path, specs, pieces, {"format": "pt"})


def write_checkpoint(out: Path, contents: Contents, seed: int) -> None:
    """All files; those that are there stay.

    Raises:
      SystemExit: the directory holds a checkpoint of other sizes, or of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The seed is no option of a model, but of what the shards hold.
    config = json.dumps({**contents.config(), "seed": seed}, indent=2) + "\n"
    described = out / "config.json"
    if described.exists() and described.read_text() != config:
        raise SystemExit(
            f"{described} is of other sizes or of another seed; choose another "
            f"--out, or remove {out}"
        )
    with new_file(described) as file:
        file.write(config.encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(assets.demo_model() / name, out / name)
    parts: list[int | None] = [None, *range(contents.sizes.layers)]
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(track(parts, description="writing layers"), 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(contents.specs(layer), shard)
        if not (out / shard).exists():
            write_shard(out / shard, contents, layer, seed)
    total = sum(path.stat().st_size for path in out.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    # Last: a directory with an index is whole.
    with new_file(out / INDEX_NAME) as file:
        file.write(json.dumps(index).encode())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Random weights in a large model's true sizes."
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--format", choices=("int4", "bf16"), default="int4")
    parser.add_argument("--seed", type=int, default=0)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=int,
            default=getattr(QWEN3_30B_A3B, field.name),
        )
    options = parser.parse_args()
    sizes = Sizes(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)}
    )
    if sizes.hidden % GROUP or sizes.intermediate % GROUP:
        parser.error(f"--hidden and --intermediate must be multiples of {GROUP}")
    write_checkpoint(options.out, Contents(sizes, options.format), options.seed)


if __name__ == "__main__":
    main()
