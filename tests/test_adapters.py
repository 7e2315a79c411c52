"""Adapters in every layout: round trips, what others write, damaged files."""

import dataclasses
import json
import math

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import (
    EXPERTS,
    HIDDEN,
    PREFIX,
    RANK,
    WIDTH,
    deltas,
    make_adapter,
    make_linear,
    make_lora,
    peft_delta,
    per_expert_tensors,
    projection_tensors,
    write_config,
    write_tensors,
)

from ktjax.io import (
    Adapter,
    AdapterError,
    CheckpointError,
    read_adapter,
    write_adapter,
)
from ktjax.io.adapters import Strength, files, inspect_adapter, ranges
from ktjax.io.adapters.names import FAMILIES
from ktjax.io.safetensors import SafetensorsFile


def tensors_of(path):
    file = SafetensorsFile(path / "adapter_model.safetensors")
    return {name: file[name] for name in file.entries}


def config_of(path):
    return json.loads((path / "adapter_config.json").read_text())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("layout", [None, "peft-fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_exact(tmp_path, family, layout, dtype):
    adapter = make_adapter(dtype=dtype)
    path = tmp_path / "adapter"
    written = write_adapter(path, adapter, family, layout=layout)
    assert written == layout or (layout is None and written == FAMILIES[family].layout)
    back = read_adapter(path)
    assert list(back.differences(adapter)) == []
    assert back.base_model == "some/model"
    info = inspect_adapter(path)
    assert (info.layout, info.rank, info.alpha) == (written, RANK, 5.0)
    assert (info.layers, info.dtypes) == ((0, 2), (np.dtype(dtype).name,))
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_per_expert_names_and_configuration(tmp_path):
    adapter = make_adapter(alpha=6.0)
    write_adapter(tmp_path / "a", adapter, "qwen3_moe")
    want, got = per_expert_tensors(adapter), tensors_of(tmp_path / "a")
    assert got.keys() == want.keys()
    assert all(np.array_equal(got[name], want[name]) for name in want)
    config = config_of(tmp_path / "a")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6, False)
    assert config["target_modules"] == ["gate_proj", "up_proj", "down_proj"]
    write_adapter(tmp_path / "b", adapter, "mixtral")
    name = f"{PREFIX}.2.block_sparse_moe.experts.1.w2.lora_A.weight"
    assert np.array_equal(tensors_of(tmp_path / "b")[name], adapter.layers[2].down_a[1])
    assert config_of(tmp_path / "b")["target_modules"] == ["w1", "w3", "w2"]


def test_fused_tensors_add_what_the_adapter_adds(tmp_path):
    adapter = make_adapter()
    write_adapter(tmp_path / "a", adapter, "qwen2_moe")
    tensors, config = tensors_of(tmp_path / "a"), config_of(tmp_path / "a")
    (gate_up_rank,), (gate_up_alpha,) = (
        config[name].values() for name in ("rank_pattern", "alpha_pattern")
    )
    assert (gate_up_rank, gate_up_alpha) == (2 * RANK, 10.0)
    for layer, (gate, up, down) in deltas(adapter).items():
        at = f"{PREFIX}.{layer}.mlp.experts"
        for where, want in (("base_layer.", np.concatenate([gate, up], 1)), ("", down)):
            a = tensors[f"{at}.{where}lora_A.weight"]
            b = tensors[f"{at}.{where}lora_B.weight"]
            got = peft_delta(a, b, EXPERTS, adapter.scaling, transposed=False)
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


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


@pytest.mark.parametrize("transposed", [False, True], ids=["0.19.1", "0.18"])
@pytest.mark.parametrize("gate_up_rank", [2, 4, 3, 1])
def test_adapters_with_a_shared_by_gate_and_up(tmp_path, gate_up_rank, transposed):
    """Both layouts of PEFT; the smaller rank is filled up with zeros."""
    want = write_fused(
        tmp_path, gate_up_rank=gate_up_rank, down_rank=2, transposed=transposed
    )
    adapter = read_adapter(tmp_path)
    assert adapter.rank == max(gate_up_rank, 2)
    for layer, got in deltas(adapter).items():
        for mine, theirs in zip(got, want[layer], strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-12, atol=1e-12)
    write_adapter(tmp_path / "again", adapter, "qwen3_moe")


def test_ktransformers(tmp_path):
    adapter = make_adapter()
    tensors = {
        f"layers.{layer}.experts.{name.replace('_', '_lora_')}": array
        for layer, lora in adapter.layers.items()
        for name, array in zip(lora.NAMES, lora.arrays(), strict=True)
    }
    write_config(tmp_path)
    write_tensors(tmp_path, tensors, "fused_expert_lora.safetensors")
    assert list(read_adapter(tmp_path).differences(adapter)) == []
    assert inspect_adapter(tmp_path).layout == "ktransformers"
    write_tensors(tmp_path, {})
    assert list(read_adapter(tmp_path).differences(adapter)) == []
    # Adapters of anything else are beside it.
    pair = make_linear(0)
    q_proj = "model.layers.0.self_attn.q_proj"
    write_tensors(tmp_path, projection_tensors({q_proj: pair}))
    both = dataclasses.replace(adapter, projections={q_proj: pair})
    assert list(read_adapter(tmp_path).differences(both)) == []
    assert inspect_adapter(tmp_path).targets == ("experts", "q_proj")
    write_tensors(tmp_path, {f"{PREFIX}.0.mlp.gate.lora_A.weight": np.ones(2)})
    with pytest.raises(AdapterError, match="is no LoRA of a routed expert"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    del tensors["layers.2.experts.up_lora_b"]
    write_tensors(tmp_path, tensors, "fused_expert_lora.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.2\.experts\.up_lora_b is missing"):
        read_adapter(tmp_path)


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_the_largest_rank(tmp_path, layout):
    adapter = make_adapter((0,), rank=256)
    write_adapter(tmp_path / "a", adapter, "qwen3_moe", layout=layout)
    assert list(read_adapter(tmp_path / "a").differences(adapter)) == []
    with pytest.raises(AdapterError, match="expected a rank of 1 to 256, got 257"):
        make_adapter((0,), rank=257)


def test_rank_stabilised_scaling(tmp_path):
    write_config(tmp_path, use_rslora=True)
    write_tensors(tmp_path, per_expert_tensors(make_adapter()))
    assert read_adapter(tmp_path).scaling == pytest.approx(5.0 / math.sqrt(RANK))


def test_patterns_that_change_nothing(tmp_path):
    write_config(tmp_path, r=7, rank_pattern={"gate_proj|up_proj": 2, r"down_.*": 2})
    write_tensors(tmp_path, per_expert_tensors(make_adapter()))
    assert read_adapter(tmp_path).rank == 2


def test_float16_becomes_float32(tmp_path):
    adapter = make_adapter(dtype=np.float32)
    halves = {k: v.astype(np.float16) for k, v in per_expert_tensors(adapter).items()}
    write_tensors(write_config(tmp_path), halves)
    read = read_adapter(tmp_path)
    assert read.dtype == np.float32
    want = adapter.layers[0].up_b.astype(np.float16)
    assert np.array_equal(read.layers[0].up_b, want)


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


def test_layers_with_a_strength_of_their_own(tmp_path):
    """Ranks 2, 3 and 1, scalings 2.5, 2.5 and 4, in both of PEFT's layouts."""
    layers = {0: make_lora(0), 1: make_lora(1, rank=3), 11: make_lora(2, rank=1)}
    strengths = {1: Strength(3, 7.5), 11: Strength(1, 4.0)}
    adapter = Adapter(RANK, 5.0, {**layers, 2: make_lora(3)}, "base", strengths)
    assert write_adapter(tmp_path / "fused", adapter, "qwen3_moe") == "peft-fused"
    patterns = {
        "rank_pattern": {r"layers\.1\..*": 3, r"layers\.11\..*": 1},
        "alpha_pattern": {r"layers\.1\..*": 7.5, r"layers\.11\..*": 4},
    }
    write_config(tmp_path / "plain", base_model_name_or_path="base", **patterns)
    write_tensors(tmp_path / "plain", per_expert_tensors(adapter))
    with pytest.raises(ValueError, match="one rank and one alpha for all layers; use"):
        write_adapter(tmp_path / "x", adapter, "qwen3_moe", layout="peft")
    for name in ("fused", "plain"):
        back = read_adapter(tmp_path / name)
        assert [back.strength(i).rank for i in (0, 1, 2, 11)] == [2, 3, 2, 1]
        assert [back.strength(i).scaling for i in (0, 1, 2, 11)] == [2.5, 2.5, 2.5, 4.0]
        assert list(back.differences(adapter)) == []
    lora = adapter.lora_config()
    for index in adapter.layers:
        own = lora.of_module(f"layers.{index}.mlp.experts")
        assert own.rank == adapter.strength(index).rank
        assert own.scaling == adapter.strength(index).scaling
    changed = {**strengths, 1: Strength(3, 9)}
    other = Adapter(RANK, 5.0, adapter.layers, "base", changed)
    assert list(adapter.differences(other)) == ["alpha 7.5 and 9 of layer 1"]
    with pytest.raises(AdapterError, match="layer 1 has rank 3, expected 2"):
        Adapter(RANK, 5.0, adapter.layers, "base")


PROJECTIONS = {
    "model.layers.0.self_attn.q_proj": make_linear(1),
    "model.layers.1.self_attn.kv_a_proj_with_mqa": make_linear(2, rank=3),
    "model.layers.1.mlp.shared_expert.down_proj": make_linear(3),
    "model.layers.11.self_attn.q_proj": make_linear(4, rank=3),
    "lm_head": make_linear(5),
}
STRENGTHS = {n: Strength(3, 9.0) for n, lora in PROJECTIONS.items() if lora.rank == 3}


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_projections_beside_the_experts(tmp_path, layout):
    """Two of them, of layers with experts, have a strength of their own."""
    experts = make_adapter((0, 1))
    adapter = dataclasses.replace(experts, projections=PROJECTIONS, strengths=STRENGTHS)
    path = tmp_path / "a"
    assert write_adapter(path, adapter, "qwen3_moe", layout=layout) == layout
    back = read_adapter(path)
    assert list(back.differences(adapter)) == []
    assert (back.rank, back.strengths) == (RANK, STRENGTHS)
    assert list(back.differences(experts)) == [
        f"projections {sorted(PROJECTIONS)} and []"
    ]
    tensors = tensors_of(path)
    for name, array in projection_tensors(PROJECTIONS).items():
        assert np.array_equal(tensors[name], array)
    info, config = inspect_adapter(path), config_of(path)
    assert info.layers == (0, 1)
    assert set(info.targets) == {
        *("experts", "q_proj", "kv_a_proj_with_mqa", "lm_head"),
        "shared_expert.down_proj",
    }
    # PEFT would take a module called down_proj for experts.
    down = "model.layers.1.mlp.shared_expert.down_proj"
    assert f"{down}.weight" in config["target_parameters"]
    assert down not in config["target_modules"]
    assert {"lm_head", "model.layers.11.self_attn.q_proj"} <= {
        *config["target_modules"]
    }


@pytest.mark.parametrize("layout", ["peft", "peft-fused"])
def test_projections_alone(tmp_path, layout):
    adapter = Adapter(
        3,
        6.0,
        {},
        projections=PROJECTIONS,
        strengths={n: Strength(2, 5.0) for n, p in PROJECTIONS.items() if p.rank == 2},
    )
    write_adapter(tmp_path / "a", adapter, "qwen2_moe", layout=layout)
    back = read_adapter(tmp_path / "a")
    assert list(back.differences(adapter)) == []
    assert (back.rank, back.alpha) == (2, 5.0)  # the most common
    assert inspect_adapter(tmp_path / "a").layers == ()


def test_patterns_about_parameters(tmp_path):
    """PEFT holds a pattern against `module.weight` if that is what is targeted."""
    name = "model.layers.0.mlp.shared_experts.up_proj"
    write_tensors(tmp_path, projection_tensors({name: make_linear(0)}))
    patterns = {r".*up_proj\.weight": RANK, "up_proj": 7}
    write_config(
        tmp_path,
        r=5,
        rank_pattern=patterns,
        target_parameters=["shared_experts.up_proj.weight"],
    )
    assert read_adapter(tmp_path).rank == RANK
    write_config(tmp_path, r=5, rank_pattern=patterns, target_modules=["up_proj"])
    with pytest.raises(AdapterError, match=r"\.up_proj has rank 2, expected 7"):
        read_adapter(tmp_path)


def test_the_configuration_targets_just_what_is_adapted():
    adapter = dataclasses.replace(
        make_adapter((0, 11)),
        projections=PROJECTIONS,
        strengths=STRENGTHS,
    )
    lora = adapter.lora_config()
    names = [f"model.layers.{i}.mlp.experts" for i in range(12)]
    names += [f"model.layers.{i}.self_attn.q_proj" for i in range(12)]
    names += ["model.layers.1.self_attn.kv_a_proj_with_mqa", "lm_head"]
    names += ["model.layers.1.mlp.shared_expert.down_proj", "model.norm"]
    wanted = {*PROJECTIONS, names[0], names[11]}
    assert {name for name in names if lora.adapts(name)} == wanted
    for name in PROJECTIONS:
        own = lora.of_module(name)
        assert Strength(own.rank, own.alpha) == adapter.strength(name)
    assert lora.of_module(names[11]).rank == RANK
    assert adapter.summary() == (
        "experts of layers 0, 11, q_proj (2), kv_a_proj_with_mqa (1), "
        "shared_expert.down_proj (1), lm_head (1)"
    )


def test_a_copied_base_weight_is_refused(tmp_path):
    tensors = projection_tensors({"lm_head": make_linear(0)})
    tensors["base_model.model.lm_head.base_layer.weight"] = np.ones((5, HIDDEN))
    write_tensors(write_config(tmp_path), tensors)
    with pytest.raises(AdapterError, match="save_embedding_layers=False"):
        read_adapter(tmp_path)


def test_what_cannot_be_written(tmp_path):
    adapter, path = make_adapter(), tmp_path / "out"
    with pytest.raises(ValueError, match="type 'gpt2' are not supported; supported: q"):
        write_adapter(path, adapter, "gpt2")
    with pytest.raises(ValueError, match="ignores the per-expert tensors of qwen2_moe"):
        write_adapter(path, adapter, "qwen2_moe", layout="peft")
    with pytest.raises(ValueError, match="must be peft or peft-fused, got 'gguf'"):
        write_adapter(path, adapter, "qwen3_moe", layout="gguf")
    lora = make_lora()
    lora.up_a[1, 0, 3] = np.inf
    with pytest.raises(AdapterError, match="up_a of layer 5 has a NaN or an infinity"):
        Adapter(RANK, 1.0, {5: lora})
    with pytest.raises(AdapterError, match="adapts nothing"):
        Adapter(RANK, 1.0, {})
    with pytest.raises(AdapterError, match=r"layer 0: lora\.gate_b: expected"):
        Adapter(RANK, 1.0, {0: dataclasses.replace(lora, gate_b=lora.gate_b[:, :, :1])})
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_reads_differently_is_no_export(tmp_path, monkeypatch):
    def corrupt(path):
        weights = path / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        return read_adapter(path)

    monkeypatch.setattr(files, "read_adapter", corrupt)
    with pytest.raises(AdapterError, match="not what was read again: down_b of layer"):
        write_adapter(tmp_path / "out", make_adapter(), "qwen3_moe")
    assert list(tmp_path.iterdir()) == []


def test_ranges():
    assert ranges([5, 0, 1, 2, 7, 8]) == "0-2, 5, 7-8"
