"""Programs for an accelerator, whose calls of the library go by way of the host.

Here there is the CPU only: the callback that other platforms get is put in the place of
the direct call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import linear_cases
import numpy as np
import pytest
from moe_cases import SEED, Case, make_inputs

import ktjax
from ktjax.ops import host


@pytest.fixture
def elsewhere(monkeypatch):
    """Calling it gives every later program the way of other platforms than the CPU."""

    def switch():
        monkeypatch.setattr(
            host, "platform_dependent", lambda *args, cpu, default: default(*args)
        )
        jax.clear_caches()

    yield switch
    monkeypatch.undo()
    jax.clear_caches()


def assert_same(a, b):
    for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert u.dtype == v.dtype
        np.testing.assert_array_equal(np.asarray(u), np.asarray(v))


@pytest.mark.parametrize(
    ("case", "options"),
    [
        (Case(tokens=24), {}),
        (Case(tokens=9, dtype="float32"), {"activation_policy": "recompute"}),
        (Case(tokens=9, rank=None), {}),
        (Case(tokens=9), {"dropout": 0.3, "dropout_seed": SEED}),
    ],
    ids=["save", "recompute", "no-lora", "dropout"],
)
def test_values_and_gradients_have_the_same_bits(use_pool, elsewhere, case, options):
    use_pool()
    inputs = make_inputs(case)

    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:

        def loss(x, w, lora):
            y = ktjax.moe(x, inputs.ids, w, store, lora, scaling=2.0, **options)
            return jnp.vdot(y.astype(jnp.float32), inputs.grad_y), y

        def run():
            step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
            step = jax.jit(step).lower(inputs.x, inputs.w, inputs.lora)
            return step, step.compile()(inputs.x, inputs.w, inputs.lora)

        direct, want = run()
        assert "callback" not in direct.as_text()
        elsewhere()
        through, got = run()
        assert "callback" in through.as_text()
        assert "ktjax_moe" not in through.as_text()
        # The same kernels; what XLA computes around them may be fused otherwise.
        assert_same(got[0][1], want[0][1])
        assert_same(got[1], want[1])


def test_projections(use_pool, elsewhere):
    use_pool()
    inputs = linear_cases.make_inputs(linear_cases.Case(rows=9))
    with ktjax.LinearStore.from_array(inputs.weight) as store:

        def loss(x, lora):
            y = ktjax.linear(x, store, lora, scaling=2.0)
            return jnp.vdot(y.astype(jnp.float32), inputs.grad_y), y

        def run():
            step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
            return step(inputs.x, inputs.lora)

        want = run()
        elsewhere()
        got = run()
        assert_same(got[0][1], want[0][1])
        assert_same(got[1], want[1])


def test_a_batch(use_pool, elsewhere):
    use_pool()
    inputs = make_inputs(Case(tokens=24))
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        args = [a.reshape(2, 12, -1) for a in (inputs.x, inputs.ids, inputs.w)]
        over = jax.vmap(lambda x, ids, w: ktjax.moe(x, ids, w, store))
        want = over(*args)
        elsewhere()
        assert_same(jax.jit(over)(*args), want)


def test_errors_say_the_same(use_pool, elsewhere):
    use_pool()
    inputs = make_inputs(Case(tokens=3))
    with ktjax.ExpertStore.from_arrays(*inputs.base) as store:
        elsewhere()
        run = jax.jit(lambda ids: ktjax.moe(inputs.x, ids, inputs.w, store))
        bad = inputs.ids.at[1, 1].set(4)
        with pytest.raises(
            jax.errors.JaxRuntimeError, match="expert id 4 of token 1, slot 1"
        ):
            jax.block_until_ready(run(bad))
        jax.block_until_ready(run(inputs.ids))
    with pytest.raises(jax.errors.JaxRuntimeError, match="closed"):
        jax.block_until_ready(run(inputs.ids))
