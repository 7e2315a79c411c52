"""Expert stores: exact values, memory, handles; the registered adapter."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ISAS
from moe_cases import Case, make_inputs, run_kernels

import ktjax
from ktjax import backend


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sizes", [(64, 64), (100, 72), (41, 23), (32, 160)])
def test_dequantize_is_exact(use_pool, isa, sizes):
    use_pool(isa, threads=1, subpools=1 if sizes[1] < 64 else 2)
    base = make_inputs(Case(1, hidden=sizes[0], intermediate=sizes[1])).base
    with ktjax.ExpertStore.from_arrays(*base) as store:
        for got, want in zip(store.dequantize(), base, strict=True):
            np.testing.assert_array_equal(got, np.asarray(want, np.float32))


def test_float32_weights_round_to_nearest_even(use_pool):
    use_pool()
    rng = np.random.default_rng(0)
    base = [rng.standard_normal((2, 64, 64), np.float32) for _ in range(3)]
    base[0][0, 0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, np.inf, -0.0]
    with ktjax.ExpertStore.from_arrays(*base) as store:
        for got, want in zip(store.dequantize(), base, strict=True):
            rounded = want.astype(jnp.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(got, rounded)


def _resident() -> int:
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) * 1024


def test_memory_is_one_copy_training_included(use_pool):
    use_pool()
    # 96 MiB of weights: far above the noise of the allocator.
    case = Case(tokens=64, experts=32, k=2, hidden=1024, intermediate=512, rank=4)
    base = [np.asarray(a) for a in make_inputs(case).base]
    weight_bytes = sum(a.nbytes for a in base)
    small = [a[:1] for a in base]
    with ktjax.ExpertStore.from_arrays(*small):
        pass  # the pool's threads and their stacks
    before = _resident()
    with ktjax.ExpertStore.from_arrays(*base) as store:
        assert store.nbytes <= 1.10 * weight_bytes
        assert _resident() - before <= 1.10 * weight_bytes
        jax.block_until_ready(run_kernels(case, store))
        after_one = _resident()
        for _ in range(3):
            jax.block_until_ready(run_kernels(case, store))
        assert _resident() - after_one <= 0.10 * weight_bytes
        # A repacked or transposed copy would be another 1.0.
        assert after_one - before <= 1.60 * weight_bytes
    assert _resident() - before <= 0.60 * weight_bytes


def test_registered_adapter(use_pool):
    use_pool()
    inputs = make_inputs(Case(tokens=9, rank=4))
    args = (inputs.x, inputs.ids, inputs.w)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        base = backend.forward_registered(store, *args)
        np.testing.assert_array_equal(base, np.asarray(ktjax.moe(*args, store)))
        backend.register_lora(store, inputs.lora, 2.0)
        got = backend.forward_registered(store, *args)
        want = ktjax.moe(*args, store, inputs.lora, scaling=2.0)
        np.testing.assert_array_equal(got, np.asarray(want))
        assert np.asarray(want != base).any()

        # The registration keeps the arrays alive and sees no later donation.
        pending = [backend.submit_forward_registered(store, *args) for _ in range(5)]
        donated = jax.jit(lambda lora: jax.tree.map(jnp.zeros_like, lora))(inputs.lora)
        backend.register_lora(store, donated, 2.0)
        for forward in pending:
            np.testing.assert_array_equal(forward.result(), np.asarray(want))
        after = backend.forward_registered(store, *args)
        np.testing.assert_array_equal(after, base)


def test_eager_forwards_into_a_given_array(use_pool):
    """float32 sums of bfloat16 tokens, which round to the bfloat16 result."""
    use_pool()
    inputs = make_inputs(Case(tokens=9, hidden=96, rank=None))
    args = (inputs.x, inputs.ids, inputs.w)
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        want = backend.forward_registered(store, *args)
        out = np.full(want.shape, np.nan, np.float32)
        forward = backend.submit_forward_registered(store, *args, out=out)
        assert forward.result() is out
        np.testing.assert_array_equal(out.astype(want.dtype), want)
        assert (out != want.astype(np.float32)).any()
        for bad, error in (
            (out[:-1], ValueError),
            (out.T.copy().T, ValueError),
            (out.astype(np.float64), TypeError),
        ):
            with pytest.raises(error, match="forward: out: expected"):
                backend.submit_forward_registered(store, *args, out=bad)


def test_registered_adapter_errors(use_pool):
    use_pool()
    inputs = make_inputs(Case(tokens=9, rank=4))
    store = ktjax.ExpertStore.from_arrays(*inputs.base)
    with pytest.raises(ValueError, match="x: expected"):
        backend.forward_registered(store, inputs.x[:, :5], inputs.ids, inputs.w)
    bad = inputs.ids.at[0, 0].set(99)
    with pytest.raises(IndexError, match="expert id 99 of token 0"):
        backend.forward_registered(store, inputs.x, bad, inputs.w)
    # An error belongs to the forward that made it.
    failing = backend.submit_forward_registered(store, inputs.x, bad, inputs.w)
    fine = backend.submit_forward_registered(store, inputs.x, inputs.ids, inputs.w)
    assert np.isfinite(fine.result()).all()
    assert failing.done()
    for _ in range(2):
        with pytest.raises(IndexError, match="expert id 99 of token 0"):
            failing.result()
    store.close()
    with pytest.raises(RuntimeError, match="is closed"):
        backend.forward_registered(store, inputs.x, inputs.ids, inputs.w)


def test_describe_names_the_machine():
    facts = backend.describe()
    assert facts["cpu"]
    assert facts["isa"] in facts["isas_supported"]
    assert facts["isa"] in facts["isa_reason"]
    assert facts["threads"] >= 1
    assert facts["numa_nodes"] >= 1
    assert facts["memory_bytes"] > 2**20
