"""What KTJAX_PROFILE=1 reports."""

from __future__ import annotations

import jax
import pytest
from moe_cases import Case, make_inputs, run_kernels

import ktjax
from ktjax import backend

CASE = Case(tokens=40, rank=8, hidden=128, intermediate=128)


@pytest.fixture
def profiled(use_pool, monkeypatch):
    monkeypatch.setenv("KTJAX_PROFILE", "1")
    use_pool(threads=2)
    yield
    monkeypatch.delenv("KTJAX_PROFILE")
    use_pool()  # a pool of its own setting comes first, so that none is profiled after


def run(format: str) -> dict[str, tuple[float, int]]:
    with ktjax.ExpertStore.from_arrays(*make_inputs(CASE).base, format=format) as store:
        backend.take_profile()
        jax.block_until_ready(run_kernels(CASE, store))
    return backend.take_profile()


def test_phases_and_work_within_them(profiled):
    profile = run("int4")
    for phase in ("routing", "gate, up, SwiGLU", "down", "grad x", "grad LoRA"):
        seconds, calls = profile[phase]
        assert seconds > 0, phase
        assert calls == (2 if phase == "routing" else 1), phase
    work = {k: v for k, v in profile.items() if k.startswith("in phases: ")}
    assert {name.removeprefix("in phases: ") for name in work} >= {
        "gather rows",
        "decode weights",
        "pack adapters",
        "activation, scatter",
    }
    phases = sum(v[0] for k, v in profile.items() if k not in work)
    assert sum(seconds for seconds, _ in work.values()) < phases


def test_bfloat16_weights_are_not_decoded(profiled):
    assert "in phases: decode weights" not in run("bf16")


def test_nothing_is_measured_unless_asked_for(use_pool):
    use_pool()
    assert run("bf16") == {}
