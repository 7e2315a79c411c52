"""Adapters in every layout: round trips, and what others write."""

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest
from adapter_cases import (
    EXPERTS,
    PREFIX,
    RANK,
    config_of,
    deltas,
    make_adapter,
    make_linear,
    make_lora,
    peft_delta,
    per_expert_tensors,
    projection_tensors,
    tensors_of,
    write_config,
    write_fused,
    write_tensors,
)

from ktjax.io import (
    Adapter,
    AdapterError,
    read_adapter,
    write_adapter,
)
from ktjax.io.adapters import Strength, files, inspect_adapter, ranges
from ktjax.io.adapters.names import FAMILIES


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
