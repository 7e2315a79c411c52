"""Adapters that are damaged, or that nobody can use: one clear error."""

import numpy as np
import pytest
from adapter_cases import (
    PREFIX,
    make_adapter,
    per_expert_tensors,
    tensors_of,
    write_config,
    write_fused,
    write_tensors,
)

from ktjax.io import (
    AdapterError,
    CheckpointError,
    read_adapter,
    write_adapter,
)

AT = f"{PREFIX}.2.mlp.experts.1.up_proj.lora_B.weight"


def without(tensors):
    del tensors[AT]


def changed(value):
    def change(tensors):
        tensors[AT] = value(tensors[AT])

    return change


def nan(array):
    array = array.copy()
    array[0, 0] = np.nan
    return array


def added(name):
    def change(tensors):
        tensors[name] = np.ones((2, 2), np.float32)

    return change


DAMAGE = {
    "missing tensor": (without, "lora_B of the up projection of expert 1 of layer 2"),
    "missing expert": (
        added(f"{PREFIX}.0.mlp.experts.999999999.up_proj.lora_A.weight"),
        "gate projection of expert 3 of layer 0 is missing",
    ),
    "wrong shape": (changed(lambda b: b[:-1]), r"float32\[5, 2\], expert 0 has"),
    "wrong rank": (changed(lambda b: b[:, :1]), r"float32\[6, 1\], expert 0 has"),
    "other dtype": (changed(lambda b: b.astype(np.float64)), r"is float64\[6, 2\]"),
    "vector": (changed(lambda b: b[0]), r"is float32\[2\]"),
    "nan": (changed(nan), "up_b of layer 2 has a NaN"),
    "half of a pair": (
        added(f"{PREFIX}.0.self_attn.q_proj.lora_A.weight"),
        r"lora_B of model\.layers\.0\.self_attn\.q_proj is missing",
    ),
    "router": (added(f"{PREFIX}.0.mlp.gate.lora_A.weight"), "gate.lora_A.weight is no"),
    "shared gate": (
        added(f"{PREFIX}.0.mlp.shared_expert_gate.lora_A.weight"),
        "is no LoRA of a routed expert",
    ),
    "dora": (
        added(f"{PREFIX}.0.mlp.experts.0.up_proj.lora_magnitude_vector"),
        "is no LoRA of a routed expert",
    ),
    "nothing": (dict.clear, "holds no LoRA of a routed expert"),
    "a fused tensor too": (
        added(f"{PREFIX}.0.mlp.experts.lora_A.weight"),
        "is no LoRA of a routed expert",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_tensors_are_one_clear_error(tmp_path, name):
    damage, words = DAMAGE[name]
    tensors = per_expert_tensors(make_adapter())
    damage(tensors)
    write_tensors(write_config(tmp_path), tensors)
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


CONFIGS = {
    "no rank": ({"r": "drop"}, "r must be a positive integer, got None"),
    "rank zero": ({"r": 0}, "r must be a positive integer, got 0"),
    "rank of another type": ({"r": "8"}, "got '8'"),
    "not the tensors' rank": ({"r": 4}, "has rank 2, expected 4"),
    "alpha": ({"lora_alpha": -1}, "lora_alpha must be a positive number, got -1"),
    "other method": ({"peft_type": "LOHA"}, "peft_type must be \"LORA\", got 'LOHA'"),
    "dora": ({"use_dora": True}, "use_dora = True is not supported"),
    "rslora of another type": ({"use_rslora": "no"}, "use_rslora must be true or fal"),
    "bias": ({"bias": "all"}, "bias = 'all' is not supported"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "pissa": ({"init_lora_weights": "pissa"}, "may have changed the base weights"),
    "ranks that differ": (
        {"rank_pattern": {"experts.1.up_proj": 4}},
        "1.up_proj has rank 4 and scaling 1.25, .* with different ranks",
    ),
    "scalings that differ": (
        {"alpha_pattern": {r"layers.2.*up_proj": 4}},
        "and scaling 2, .* has 2 and 2.5",
    ),
    "bad pattern": ({"rank_pattern": {"(": 4}}, "no regular expression"),
    "pattern of another type": ({"rank_pattern": [1]}, "rank_pattern must be an obj"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_unusable_configurations_are_one_clear_error(tmp_path, name):
    changes, words = CONFIGS[name]
    write_config(tmp_path, **changes)
    write_tensors(tmp_path, per_expert_tensors(make_adapter()))
    with pytest.raises(AdapterError, match=words) as caught:
        read_adapter(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_unusable_files_are_one_clear_error(tmp_path):
    with pytest.raises(AdapterError, match="no such directory"):
        read_adapter(tmp_path / "nowhere")
    with pytest.raises(AdapterError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path)
    write_config(tmp_path)
    with pytest.raises(AdapterError, match="save the adapter with safetensors"):
        read_adapter(tmp_path)
    write_tensors(tmp_path, per_expert_tensors(make_adapter()))
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    with pytest.raises(ValueError, match="truncated"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="not valid JSON"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_random_damage_is_an_adapter_or_one_error(tmp_path, layout):
    path = tmp_path / "adapter"
    write_adapter(path, make_adapter(), "qwen3_moe", layout=layout)
    weights, rng = path / "adapter_model.safetensors", np.random.default_rng(0)
    sound, refused = weights.read_bytes(), []
    for _ in range(100):
        content = bytearray(sound)
        for place in rng.integers(0, len(content), 3):
            content[place] = rng.integers(0, 256)
        weights.write_bytes(content[: rng.integers(1, 2 * len(content))])
        try:
            read_adapter(path)
        except CheckpointError as error:
            refused.append(str(error))
    assert 50 < len(refused) < 100
    assert all(str(path) in message for message in refused)


@pytest.mark.parametrize(
    ("end", "change", "words"),
    [
        ("lora_A.weight", None, "lora_A.weight is missing"),
        ("lora_B.weight", lambda b: b[:-1], "fit no layout of PEFT's"),
        ("lora_A.weight", lambda a: a[:-1], "times one number of experts"),
        ("lora_A.weight", lambda a: a[0], "must be a matrix"),
    ],
)
def test_damaged_fused_tensors_are_one_clear_error(tmp_path, end, change, words):
    write_fused(tmp_path, gate_up_rank=4, down_rank=2, transposed=False)
    tensors = tensors_of(tmp_path)
    name = f"{PREFIX}.4.mlp.experts.{end}"
    tensors = {key: np.array(value) for key, value in tensors.items()}
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors[name])
    write_tensors(tmp_path, tensors)
    with pytest.raises(AdapterError, match=words):
        read_adapter(tmp_path)


def test_fused_scalings_that_differ(tmp_path):
    write_fused(tmp_path, gate_up_rank=4, down_rank=2, transposed=False)
    write_config(tmp_path, rank_pattern={"gate_up_proj": 4})
    with pytest.raises(AdapterError, match=r"different scalings.*has 1\.25 and 2\.5"):
        read_adapter(tmp_path)
