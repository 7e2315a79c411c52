"""Small random adapters, and files in the layouts that others write."""

import json

import numpy as np

from ktjax.io import Adapter, save_file
from ktjax.io.safetensors import SafetensorsFile
from ktjax.lora import LinearLoRA, LoRA

EXPERTS, HIDDEN, WIDTH, RANK = 3, 8, 6, 2
PREFIX = "base_model.model.model.layers"


def make_lora(
    seed=0, *, experts=EXPERTS, hidden=HIDDEN, width=WIDTH, rank=RANK, dtype=np.float32
):
    rng = np.random.default_rng(seed)
    shapes = LoRA.shapes(experts, hidden, width, rank).values()
    return LoRA(*(rng.normal(size=shape).astype(dtype) for shape in shapes))


def make_linear(seed=0, *, inputs=HIDDEN, outputs=5, rank=RANK, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = LinearLoRA.shapes(outputs, inputs, rank).values()
    return LinearLoRA(*(rng.normal(size=shape).astype(dtype) for shape in shapes))


def projection_tensors(projections):
    """What PEFT calls adapters of modules, spelt out."""
    return {
        f"base_model.model.{name}.lora_{side}.weight": array
        for name, lora in projections.items()
        for side, array in zip("AB", (lora.a, lora.b), strict=True)
    }


def make_adapter(layers=(0, 2), alpha=5.0, base_model="some/model", **kwargs):
    loras = {index: make_lora(index, **kwargs) for index in layers}
    return Adapter(kwargs.get("rank", RANK), alpha, loras, base_model)


def write_config(path, **changes):
    path.mkdir(exist_ok=True)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 5.0, "bias": "none"}
    config = {**config, **changes}
    text = json.dumps({key: value for key, value in config.items() if value != "drop"})
    (path / "adapter_config.json").write_text(text)
    return path


def per_expert_tensors(adapter):
    """PEFT's per-expert tensors, spelt out."""
    return {
        f"{PREFIX}.{layer}.mlp.experts.{expert}.{part}_proj.lora_{side}.weight": array
        for layer, lora in adapter.layers.items()
        for part in ("gate", "up", "down")
        for side in "AB"
        for expert, array in enumerate(getattr(lora, f"{part}_{side.lower()}"))
    }


def write_tensors(path, tensors, name="adapter_model.safetensors"):
    save_file(path / name, tensors)
    return path


def deltas(adapter):
    """layer -> s B A of gate, up and down `[experts, out, in]`, in float64."""
    return {
        index: [
            adapter.scaling
            * (
                np.float64(getattr(lora, f"{part}_b"))
                @ np.float64(getattr(lora, f"{part}_a"))
            )
            for part in ("gate", "up", "down")
        ]
        for index, lora in adapter.layers.items()
    }


def peft_delta(a, b, experts, scaling, transposed):
    """What PEFT's ParamWrapper adds to a parameter, from its flattened A and B."""
    a = np.float64(a).reshape(experts, -1, a.shape[-1])
    b = np.float64(b).reshape(b.shape[0], -1, experts)
    order = "e i o" if transposed else "e o i"
    return scaling * np.einsum(f"o r e, e r i -> {order}", b, a)


def tensors_of(path):
    """The tensors of an adapter's file by name."""
    file = SafetensorsFile(path / "adapter_model.safetensors")
    return {name: file[name] for name in file.entries}


def config_of(path):
    """Its adapter_config.json."""
    return json.loads((path / "adapter_config.json").read_text())


def write_fused(path, *, gate_up_rank, down_rank, transposed, seed=0, **config):
    """As PEFT saves a trained `target_parameters` adapter; returns its deltas."""
    rng = np.random.default_rng(seed)
    tensors, want = {}, {}
    for layer in (1, 4):
        at, added = f"{PREFIX}.{layer}.mlp.experts", []
        for where, rank, inputs, outputs in (
            ("base_layer.", gate_up_rank, HIDDEN, 2 * WIDTH),
            ("", down_rank, WIDTH, HIDDEN),
        ):
            if transposed:
                inputs, outputs = outputs, inputs
            a = rng.normal(size=(rank * EXPERTS, inputs)).astype(np.float32)
            b = rng.normal(size=(outputs, rank * EXPERTS)).astype(np.float32)
            tensors[f"{at}.{where}lora_A.weight"] = a
            tensors[f"{at}.{where}lora_B.weight"] = b
            added.append(peft_delta(a, b, EXPERTS, 2.5, transposed))
        want[layer] = [added[0][:, :WIDTH], added[0][:, WIDTH:], added[1]]
    write_config(
        path,
        r=down_rank,
        lora_alpha=2.5 * down_rank,
        rank_pattern={r".*\.gate_up_proj": gate_up_rank},
        alpha_pattern={r".*\.gate_up_proj": 2.5 * gate_up_rank},
        **config,
    )
    write_tensors(path, tensors)
    return want
