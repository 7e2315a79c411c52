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

BF16 = np.dtype(ml_dtypes.bfloat16)
GROUP = 32
# Standard deviation of the weights, as Hugging Face initialises such models.
STD = 0.02
# Of the codes -8 to 7, all as likely.
CODE_STD = 21.25**0.5
# Values that are made at a time.
PIECE = 1 << 24

Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a Qwen3-MoE; those of Qwen3-30B-A3B by default."""

    layers: int = 48
    experts: int = 128
    experts_per_token: int = 8
    hidden: int = 2048
    intermediate: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocab: int = 151936

    def config(self, format: str) -> dict[str, Any]:
        """config.json."""
        config: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            # Of dense layers, of which there are none.
            "intermediate_size": 3 * self.hidden,
            "moe_intermediate_size": self.intermediate,
            "num_experts": self.experts,
            "num_experts_per_tok": self.experts_per_token,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "router_aux_loss_coef": 0.001,
            "hidden_act": "silu",
            "attention_bias": False,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "bos_token_id": None,
            # The demo's tokenizer's.
            "eos_token_id": 5,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
        }
        if format == "int4":
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
        at = f"model.layers.{layer}"
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            f"{at}.input_layernorm.weight": (self.hidden,),
            f"{at}.post_attention_layernorm.weight": (self.hidden,),
            f"{at}.self_attn.q_norm.weight": (self.head_dim,),
            f"{at}.self_attn.k_norm.weight": (self.head_dim,),
            f"{at}.self_attn.q_proj.weight": (queries, self.hidden),
            f"{at}.self_attn.k_proj.weight": (keys, self.hidden),
            f"{at}.self_attn.v_proj.weight": (keys, self.hidden),
            f"{at}.self_attn.o_proj.weight": (self.hidden, queries),
            f"{at}.mlp.gate.weight": (self.experts, self.hidden),
        }

    def around(self) -> dict[str, tuple[int, ...]]:
        """Shapes of what is no layer's."""
        return {
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
            "lm_head.weight": (self.vocab, self.hidden),
        }

    def expert_matrices(self, layer: int) -> dict[str, tuple[int, int]]:
        """Shapes of the experts' projections, named without `.weight`."""
        wide, tall = (self.intermediate, self.hidden), (self.hidden, self.intermediate)
        return {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}": shape
            for expert in range(self.experts)
            for name, shape in (
                ("gate_proj", wide),
                ("up_proj", wide),
                ("down_proj", tall),
            )
        }

    def specs(self, layer: int | None, format: str) -> dict[str, Spec]:
        """What is in the file of a layer, or in that of the rest (None)."""
        dense = self.around() if layer is None else self.matrices(layer)
        specs = {name: Spec(BF16, shape) for name, shape in dense.items()}
        if layer is None:
            return specs
        for at, (outputs, depth) in self.expert_matrices(layer).items():
            if format == "bf16":
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


def write_shard(
    path: Path, sizes: Sizes, layer: int | None, format: str, seed: int
) -> None:
    """One file, complete or not there."""
    rng = np.random.default_rng([seed, sizes.layers if layer is None else layer])
    specs = sizes.specs(layer, format)
    true_shapes = {} if layer is None else sizes.expert_matrices(layer)

    def pieces(name: str) -> Iterator[Array]:
        return pieces_of(name, specs[name], true_shapes, rng)

    save_stream(path, specs, pieces, {"format": "pt"})


def write_checkpoint(out: Path, sizes: Sizes, format: str, seed: int) -> None:
    """All files; those that are there stay.

    Raises:
      SystemExit: the directory holds a checkpoint of other sizes, or of another seed.
    """
    out.mkdir(parents=True, exist_ok=True)
    # The seed is no option of a model, but of what the shards hold.
    config = json.dumps({**sizes.config(format), "seed": seed}, indent=2) + "\n"
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
    parts: list[int | None] = [None, *range(sizes.layers)]
    weight_map: dict[str, str] = {}
    for number, layer in enumerate(track(parts, description="writing layers"), 1):
        shard = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        weight_map |= dict.fromkeys(sizes.specs(layer, format), shard)
        if not (out / shard).exists():
            write_shard(out / shard, sizes, layer, format, seed)
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
            f"--{field.name.replace('_', '-')}", type=int, default=field.default
        )
    options = parser.parse_args()
    sizes = Sizes(
        **{f.name: getattr(options, f.name) for f in dataclasses.fields(Sizes)}
    )
    if sizes.hidden % GROUP or sizes.intermediate % GROUP:
        parser.error(f"--hidden and --intermediate must be multiples of {GROUP}")
    write_checkpoint(options.out, sizes, options.format, options.seed)


if __name__ == "__main__":
    main()
