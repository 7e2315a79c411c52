"""The Flax MoE layer: routing, gradients, transforms, the linen bridge."""

from __future__ import annotations

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import relative
from flax import linen, nnx
from flax.nnx import bridge

import ktjax
from ktjax.experts import KTMoEWrapper
from ktjax.nn import (
    AdapterDropout,
    CorrectionBias,
    MoELayer,
    ReferenceExperts,
    RoutedExperts,
    RoutingRule,
    StoreHandle,
    TopKRouter,
    load_balancing_loss,
)
from ktjax.nn.dense import matmul

EXPERTS, HIDDEN, INTERMEDIATE, K, RANK = 4, 64, 32, 2, 4


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)

    def matrix(*shape):
        # Exact in bfloat16, so the store holds the very values of the reference.
        value = rng.normal(size=shape) * shape[-1] ** -0.5
        return np.asarray(jnp.asarray(value, jnp.bfloat16).astype(jnp.float32))

    return (
        matrix(EXPERTS, INTERMEDIATE, HIDDEN),
        matrix(EXPERTS, INTERMEDIATE, HIDDEN),
        matrix(EXPERTS, HIDDEN, INTERMEDIATE),
    )


@pytest.fixture(scope="module")
def store(weights):
    with ktjax.ExpertStore.from_arrays(*weights) as store:
        yield store


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(1), (3, 5, HIDDEN))


def randomize_b(experts):
    """B is zero at first, which would hide half of the gradients."""
    for number, name in enumerate(("gate_b", "up_b", "down_b")):
        param = getattr(experts, name)
        noise = jax.random.normal(jax.random.key(7 + number), param.shape)
        param.set_value(0.1 * noise.astype(param.dtype))
    return experts


def make_layer(experts, **kwargs):
    return MoELayer(
        experts,
        hidden_size=HIDDEN,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        dtype=jnp.float32,
        rngs=nnx.Rngs(3),
        **kwargs,
    )


def make_experts(source, rank=RANK, dropout=0.0):
    kwargs = {"lora_rank": rank, "lora_alpha": 8.0, "rngs": nnx.Rngs(2)}
    kwargs |= {"dropout": dropout}
    if isinstance(source, tuple):
        return ReferenceExperts(*source, **kwargs)
    return RoutedExperts(source, **kwargs)


# The kernels' contract: relative L2 against the float32 reference, for any pass.
KERNEL_TOLERANCE = 0.006


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [(), (1,), (2, 5)])
def test_matmul_accumulates_in_float32(rows, transposed):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (*rows, HIDDEN), jnp.bfloat16)
    kernel = jax.random.normal(keys[1], (HIDDEN, 24), jnp.bfloat16)
    grad = jax.random.normal(keys[2], (*rows, 24), jnp.bfloat16)

    def exact(x, kernel):
        return jnp.matmul(x, kernel, precision="highest")

    def ours(x, kernel):
        return matmul(x, kernel.T if transposed else kernel, transposed)

    @jax.jit
    def both(x, kernel, grad):
        y, pullback = jax.vjp(ours, x, kernel)
        wide = [a.astype(jnp.float32) for a in (x, kernel, grad)]
        want, want_pullback = jax.vjp(exact, *wide[:2])
        return (y, *pullback(grad)), (want, *want_pullback(wide[2]))

    got, want = both(x, kernel, grad)
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.bfloat16
        assert a.shape == b.shape
        # One rounding to bfloat16, after sums in float32 of at most 64 terms.
        terms = 64 * 2**-24 * np.abs(np.asarray(b)).max()
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=8 * terms)


def test_lora_initial_values(store):
    experts = make_experts(store)
    assert experts.scaling == 2.0
    bound = HIDDEN**-0.5
    a = np.asarray(experts.gate_a[...])
    assert a.shape == (EXPERTS, RANK, HIDDEN)
    assert np.abs(a).max() <= bound
    # Uniform in ±bound has standard deviation bound/√3; 1024 values: 3 sigma is 5 %.
    np.testing.assert_allclose(a.std(), bound / np.sqrt(3), rtol=0.05)
    assert np.abs(np.asarray(experts.down_a[...])).max() <= INTERMEDIATE**-0.5
    for name in ("gate_b", "up_b", "down_b"):
        assert not np.any(np.asarray(getattr(experts, name)[...]))


def test_the_handle_is_neither_param_nor_lora(store):
    layer = make_layer(make_experts(store))
    handles = jax.tree.leaves(nnx.state(layer, StoreHandle))
    assert [(h.shape, h.dtype) for h in handles] == [((2,), jnp.uint32)]
    for kind in (nnx.Param, nnx.LoRAParam):
        leaves = jax.tree.leaves(nnx.state(layer, kind))
        assert leaves
        assert all(leaf.dtype == jnp.float32 for leaf in leaves)
    assert len(jax.tree.leaves(nnx.state(layer, nnx.LoRAParam))) == 6


def route_in_numpy(logits, bias, rule, k):
    """One token: the chosen experts in any order, their weights by expert."""
    if rule.scores == "softmax":
        scores = np.exp(logits - logits.max())
        scores /= scores.sum()
    else:
        scores = 1 / (1 + np.exp(-logits))
    choice = scores + bias
    size = len(scores) // rule.groups
    worth = [
        np.sort(choice[at : at + size])[-rule.group_top :].sum()
        for at in range(0, len(scores), size)
    ]
    best = np.argsort(worth)[-rule.groups_per_tok :]
    allowed = np.isin(np.arange(len(scores)) // size, best)
    ids = np.argsort(np.where(allowed, choice, -np.inf))[-k:]
    w = scores[ids] / scores[ids].sum() if rule.normalize else scores[ids]
    weights = np.zeros_like(scores)
    weights[ids] = w * rule.scaling
    return set(ids), weights, scores / scores.sum()


@pytest.mark.parametrize(
    "rule",
    [
        RoutingRule(),
        RoutingRule(normalize=False),
        RoutingRule(normalize=False, groups=4, groups_per_tok=2, scaling=16.0),
        RoutingRule("sigmoid", normalize=False),
        RoutingRule("sigmoid", True, 4, 2, 2, scaling=2.5),
    ],
    ids=str,
)
def test_router_against_numpy(x, rule):
    experts, k = 8, 3
    router = TopKRouter(HIDDEN, experts, k, rule=rule, rngs=nnx.Rngs(0))
    bias = np.zeros(experts)
    if rule.correction_bias:
        bias = 0.5 * np.random.default_rng(0).normal(size=experts)
        router.bias.set_value(jnp.asarray(bias, jnp.float32))
    ids, w, routing = jax.tree.map(np.asarray, router(x))
    logits = np.asarray(x, np.float64) @ np.asarray(router.gate.kernel[...], np.float64)
    counts, probabilities = np.zeros(experts), np.zeros(experts)
    for token in np.ndindex(logits.shape[:-1]):
        chosen, weights, p = route_in_numpy(logits[token], bias, rule, k)
        assert set(ids[token]) == chosen
        np.testing.assert_allclose(w[token], weights[ids[token]], rtol=1e-5)
        counts[ids[token]] += 1 / 15
        probabilities += p / 15
    np.testing.assert_allclose(routing.load, counts, rtol=1e-5)
    np.testing.assert_allclose(routing.probability, probabilities, rtol=1e-5)


def test_the_correction_bias_is_float32_and_not_trained(store):
    layer = make_layer(make_experts(store), rule=RoutingRule(correction_bias=True))
    (bias,) = jax.tree.leaves(nnx.state(layer, CorrectionBias))
    assert (bias.shape, bias.dtype) == ((EXPERTS,), jnp.float32)
    assert "bias" not in nnx.state(layer, nnx.Param)["router"]


def test_masked_tokens_do_not_count(store, x):
    layer = make_layer(make_experts(store))
    mask = jnp.arange(5) < jnp.array([5, 2, 0])[:, None]
    y, routing = layer(x, mask)
    full, _ = layer(x)
    np.testing.assert_array_equal(y[mask], full[mask])
    assert not np.any(np.asarray(y[~mask]))
    _, kept = layer(x[mask])
    np.testing.assert_allclose(routing.load, kept.load, rtol=1e-6)
    np.testing.assert_allclose(routing.probability, kept.probability, rtol=1e-5)
    ids, _, nobody = layer.router(x, jnp.zeros((3, 5), bool))
    assert np.all(np.asarray(ids) == -1)
    assert not np.any(np.asarray(nobody.load))


def test_load_balancing_loss_is_k_when_even():
    from ktjax.nn import Routing

    even = Routing(jnp.full(EXPERTS, K / EXPERTS), jnp.full(EXPERTS, 1 / EXPERTS))
    np.testing.assert_allclose(load_balancing_loss([even, even]), K, rtol=1e-6)
    with pytest.raises(ValueError, match="no layer has a router"):
        load_balancing_loss([])


def loss_of(layer, x):
    y, routing = layer(x)
    return jnp.mean(y.astype(jnp.float32) ** 2) + 0.01 * load_balancing_loss([routing])


@pytest.mark.parametrize("shared", [None, 48])
def test_value_and_gradients_against_the_reference(store, weights, x, shared):
    grads = []
    for source in (store, weights):
        layer = make_layer(
            randomize_b(make_experts(source)),
            shared_intermediate_size=shared,
            gate_shared=shared is not None,
        )
        both = nnx.DiffState(0, nnx.Any(nnx.LoRAParam, nnx.Param))
        value, grad = nnx.jit(nnx.value_and_grad(loss_of, argnums=both))(layer, x)
        grads.append((value, nnx.to_flat_state(grad)))
    (got_value, got), (want_value, want) = grads
    # The loss is quadratic in y: twice the relative error of y.
    assert abs(got_value - want_value) <= 2 * KERNEL_TOLERANCE * abs(want_value)
    assert len(want) == (11 if shared else 7)
    for (path, g), (want_path, w) in zip(got, want, strict=True):
        assert path == want_path
        # Upstream of the layer's own error comes that of y, through 2y.
        assert relative(g[...], w[...]) <= 2 * KERNEL_TOLERANCE, path


def test_training_updates_only_lora_and_traces_once(store, x):
    layer = make_layer(make_experts(store))
    frozen = jax.tree.map(np.asarray, nnx.state(layer, nnx.Not(nnx.LoRAParam)))
    optimizer = nnx.Optimizer(layer, optax.adam(1e-2), wrt=nnx.LoRAParam)
    traces = []

    @nnx.jit
    def step(layer, optimizer, x):
        traces.append(1)
        grad = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, nnx.LoRAParam))
        loss, grads = grad(layer, x)
        optimizer.update(layer, grads)
        return loss

    losses = [float(step(layer, optimizer, x)) for _ in range(8)]
    assert losses[-1] < losses[0]
    assert len(traces) == 1
    after = jax.tree.map(np.asarray, nnx.state(layer, nnx.Not(nnx.LoRAParam)))
    jax.tree.map(np.testing.assert_array_equal, after, frozen)
    assert np.any(np.asarray(layer.experts.down_b[...]))


def test_remat_gives_the_same_gradients(store, x):
    layer = make_layer(randomize_b(make_experts(store)))

    def rematted(layer, x):
        return nnx.remat(loss_of)(layer, x)

    grads = [
        nnx.jit(nnx.grad(f, argnums=nnx.DiffState(0, nnx.LoRAParam)))(layer, x)
        for f in (loss_of, rematted)
    ]
    flat = [nnx.to_flat_state(grad) for grad in grads]
    for (path, a), (_, b) in zip(*flat, strict=True):
        np.testing.assert_allclose(
            a[...], b[...], rtol=1e-5, atol=1e-9, err_msg=str(path)
        )


def test_dropout_is_switched_and_counted_as_flax_does(store, weights, x):
    layers = [
        make_layer(randomize_b(make_experts(source, dropout=0.3)))
        for source in (store, weights)
    ]
    plain = make_layer(randomize_b(make_experts(store)))(x)[0]
    run = nnx.jit(lambda layer, x: layer(x)[0])
    for layer in layers:
        assert not layer.experts.dropout.deterministic
    # Both kinds of experts draw the same masks, call after call.
    calls = [[run(layer, x) for _ in range(2)] for layer in layers]
    for one, two in zip(*calls, strict=True):
        assert relative(one, two) < 1e-4
        assert relative(one, plain) > 1e-2
    assert relative(*calls[0]) > 1e-2
    for layer in layers:
        assert int(layer.experts.dropout.rngs.count[...]) == 2
        layer.eval()
        assert relative(run(layer, x), plain) < 1e-4
        assert int(layer.experts.dropout.rngs.count[...]) == 2
        view = nnx.view(layer, deterministic=False)
        assert relative(view(x)[0], plain) > 1e-2
        layer.train()
        assert relative(run(layer, x), plain) > 1e-2
    np.testing.assert_array_equal(
        run(nnx.view(layers[0], deterministic=True), x), plain
    )


def test_remat_with_dropout_gives_the_same_gradients(store, x):
    grads = []
    for f in (loss_of, nnx.remat(loss_of)):
        layer = make_layer(randomize_b(make_experts(store, dropout=0.3)))
        grads.append(
            nnx.jit(nnx.grad(f, argnums=nnx.DiffState(0, nnx.LoRAParam)))(layer, x)
        )
        assert int(layer.experts.dropout.rngs.count[...]) == 1
    for a, b in zip(*map(jax.tree.leaves, grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_dropout_of_nothing_and_out_of_range(store, weights):
    for make in (
        functools.partial(RoutedExperts, store),
        functools.partial(ReferenceExperts, *weights),
    ):
        with pytest.raises(ValueError, match=r"needs a lora_rank, got a rate of 0\.1"):
            make(dropout=0.1, rngs=nnx.Rngs(0))
        with pytest.raises(ValueError, match="experts: dropout: expected a rate of"):
            make(lora_rank=4, dropout=1.0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="here: dropout needs rngs to draw seeds from"):
        AdapterDropout(0.1, rngs=None, where="here")
    assert not jax.tree.leaves(nnx.state(make_experts(store), nnx.RngState))


def test_layers_stack_under_scan(weights, x):
    stores = [ktjax.ExpertStore.from_arrays(*(n * w for w in weights)) for n in (1, 2)]
    layers = [make_layer(make_experts(store)) for store in stores]
    want = x
    for layer in layers:
        want = want + layer(want)[0]
    graph, *states = (
        nnx.split(layers[0])[0],
        *(nnx.split(layer)[1] for layer in layers),
    )
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)

    def body(x, state):
        return x + nnx.merge(graph, state)(x)[0], None

    got, _ = jax.jit(lambda x, s: jax.lax.scan(body, x, s))(x, stacked)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    for store in stores:
        store.close()


def test_linen_bridge(store, x):
    def factory(rngs):
        del rngs  # the layer below draws from fixed keys, to compare with nnx
        return make_layer(randomize_b(make_experts(store)))

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            y, routing = bridge.to_linen(factory, name="moe")(x)
            return x + y, routing.load

    block = Block()
    variables = block.init(jax.random.key(0), x)
    (y, load), want = (
        block.apply(variables, x),
        make_layer(randomize_b(make_experts(store)))(x),
    )
    np.testing.assert_allclose(y, x + want[0], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(load, want[1].load)
    lora = {"LoRAParam": variables["LoRAParam"]}
    rest = {name: value for name, value in variables.items() if name != "LoRAParam"}

    @jax.jit
    @jax.grad
    def grad(lora):
        return jnp.mean(block.apply({**rest, **lora}, x)[0] ** 2)

    leaves = jax.tree.leaves(grad(lora))
    assert len(leaves) == 6
    assert all(np.any(np.asarray(leaf)) for leaf in leaves)


def test_the_layer_takes_a_wrapper(weights, store, x):
    pool = ktjax.backend.get_pool().config
    wrapper = KTMoEWrapper(
        layer_idx=0,
        num_experts=EXPERTS,
        num_experts_per_tok=K,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_gpu_experts=0,
        cpuinfer_threads=pool.threads_per_subpool * pool.subpool_count,
        threadpool_count=pool.subpool_count,
        weight_path="",
        chunked_prefill_size=64,
        method="AMXBF16_SFT",
        mode="sft",
        lora_rank=RANK,
        lora_alpha=8.0,
    )
    wrapper.load_weights_from_arrays(*weights)
    experts = randomize_b(make_experts(store))
    wrapper.init_lora_weights(*experts.lora.arrays())
    grads = []
    for layer in (make_layer(wrapper), make_layer(experts)):
        both = nnx.DiffState(0, nnx.LoRAParam)
        value, grad = nnx.jit(nnx.value_and_grad(loss_of, argnums=both))(layer, x)
        grads.append((value, *jax.tree.leaves(grad)))
    # The same kernels on the same values; XLA may fuse around them differently.
    for got, want in zip(*grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    wrapper.close()


def test_the_store_lives_as_long_as_the_module(weights, x):
    store = ktjax.ExpertStore.from_arrays(*weights)
    alive = weakref.ref(store)
    experts = RoutedExperts(store)
    copy = nnx.clone(experts)
    del store
    ids, w = jnp.zeros((3, 5, K), jnp.int32), jnp.ones((3, 5, K))
    call = nnx.jit(lambda experts, *args: experts(*args))
    np.testing.assert_array_equal(call(copy, x, ids, w), call(experts, x, ids, w))
    with pytest.raises(RuntimeError, match="this is a view"):
        copy.close()
    gc.collect()
    assert alive() is not None
    # jit's caches must not hold the weights, nor may a copy see memory that is gone.
    del experts
    gc.collect()
    assert alive() is None
    with pytest.raises((RuntimeError, ValueError), match="is closed"):
        jax.block_until_ready(call(copy, x, ids, w))


def test_close(weights, x):
    experts = RoutedExperts(ktjax.ExpertStore.from_arrays(*weights))
    experts.close()
    ids, w = jnp.zeros((3, 5, K), jnp.int32), jnp.ones((3, 5, K))
    with pytest.raises((RuntimeError, ValueError), match="is closed"):
        jax.block_until_ready(experts(x, ids, w))


def test_bfloat16_tokens_stay_bfloat16(store, x):
    layer = make_layer(make_experts(store), shared_intermediate_size=48)
    assert layer(x.astype(jnp.bfloat16))[0].dtype == jnp.bfloat16


def test_errors(store):
    for k, rule, message in (
        (5, {}, "num_experts_per_tok = 5 must be 1 to num_experts = 4"),
        (2, {"groups": 3}, "must be a multiple of groups = 3"),
        (2, {"groups": 4}, r"more than the 1 \* 1 experts of the chosen groups"),
        (1, {"groups": 4, "group_top": 2}, "group_top = 2 is more than the 1 experts"),
        (2, {"groups": 2, "groups_per_tok": 3}, "1 to groups = 2, got 3"),
        (2, {"scores": "relu"}, "softmax or sigmoid, got 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            TopKRouter(HIDDEN, 4, k, rule=RoutingRule(**rule), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="1 to 256, got 0"):
        RoutedExperts(store, lora_rank=0, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="needs rngs"):
        RoutedExperts(store, lora_rank=4)
    with pytest.raises(ValueError, match="gate_shared needs shared experts"):
        make_layer(make_experts(store), gate_shared=True)
