"""Adapters of projections beside the routed experts, in PEFT's layouts."""

import dataclasses

import numpy as np
import pytest
from adapter_cases import (
    HIDDEN,
    RANK,
    config_of,
    make_adapter,
    make_linear,
    projection_tensors,
    tensors_of,
    write_config,
    write_tensors,
)

from ktjax.io import (
    Adapter,
    AdapterError,
    read_adapter,
    write_adapter,
)
from ktjax.io.adapters import Strength, inspect_adapter

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
