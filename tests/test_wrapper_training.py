"""Training through the wrapper: eager loop, jitted loop, layers in a scan."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from wrapper_support import (
    assert_close,
    base_arrays,
    inputs,
    lora_arrays,
    make_wrapper,
    output_gradient,
    record_registrations,
    reference,
    reference_gradients,
)

from ktjax import experts_state
from ktjax.experts_sft_base import LORA_NAMES


def target():
    """Outputs of other adapters: something to learn."""
    x, ids, w = inputs(tokens=16)
    teacher = make_wrapper(lora=False)
    teacher.init_lora_weights(*lora_arrays(seed=60))
    return x, ids, w, teacher(x, ids, w)


def test_eager_training_loop():
    wrapper = make_wrapper(lora=False)
    wrapper.init_lora_weights(rngs=nnx.Rngs(1))
    x, ids, w, wanted = target()
    optimizer = optax.adamw(3e-2)
    params = {name: getattr(wrapper, name).get_value() for name in LORA_NAMES}
    state = optimizer.init(params)
    losses = []
    for _ in range(30):
        error = wrapper.forward_sft(x, ids, w) - wanted
        losses.append(float(jnp.mean(error**2)))
        _, grads = wrapper.backward(2 * error / error.size)
        grads = {name: grads[f"grad_{name}"] for name in params}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, value in params.items():
            getattr(wrapper, name).set_value(value)
        wrapper.update_lora_weights()
    assert losses[-1] < 0.2 * losses[0], losses


@pytest.mark.parametrize("donate", [False, True])
def test_jitted_training_loop(donate, monkeypatch):
    registrations = record_registrations(monkeypatch)
    wrapper = make_wrapper(lora=False)
    wrapper.init_lora_weights(rngs=nnx.Rngs(1))
    x, ids, w, wanted = target()
    optimizer = nnx.Optimizer(wrapper, optax.adamw(3e-2), wrt=nnx.LoRAParam)
    traces = 0

    def train_step(module, optimizer, x, ids, w, wanted):
        nonlocal traces
        traces += 1

        def loss_of(module):
            return jnp.mean((module(x, ids, w) - wanted) ** 2)

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        loss, grads = nnx.value_and_grad(loss_of, argnums=wrt)(module)
        optimizer.update(module, grads)
        return loss

    step = nnx.jit(train_step, donate_argnums=(0, 1) if donate else ())
    losses = [float(step(wrapper, optimizer, x, ids, w, wanted)) for _ in range(15)]
    # The eager methods in the middle of training neither retrace nor lag behind.
    before = len(registrations)
    y = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert len(registrations) == before + 1
    assert_close(y, reference(x, ids, w, wrapper.lora, 2.0))
    wrapper.forward_sft(x, ids, w)
    wrapper.backward(y)
    wrapper.update_lora_weights()
    losses += [float(step(wrapper, optimizer, x, ids, w, wanted)) for _ in range(15)]
    assert traces == 1
    assert losses[-1] < 0.2 * losses[0], losses
    assert type(wrapper.store_handle) is experts_state.StoreHandle


def test_donated_adapters_stay_readable_for_what_was_saved_before():
    """A donating step between forward and backward must not reuse their memory."""
    wrapper = make_wrapper()
    x, ids, w = inputs()
    before = jax.tree.map(np.array, wrapper.lora)

    @nnx.jit(donate_argnums=0)
    def step(module):
        for name in LORA_NAMES:
            param = getattr(module, name)
            param.set_value(1.0 - 2.0 * param.get_value())

    wrapper.forward_sft(x, ids, w)
    step(wrapper)
    grad = output_gradient(x.shape)
    dx, _, dlora = reference_gradients(x, ids, w, before, 2.0, grad)
    grad_input, grads = wrapper.backward(grad)
    assert_close(grad_input, dx)
    assert_close(grads["grad_up_lora_b"], dlora.up_b)
    y = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert_close(y, reference(x, ids, w, wrapper.lora, 2.0))


def test_pure_path_and_eager_path_have_the_same_gradients():
    wrapper = make_wrapper()
    x, ids, w = inputs()
    grad = output_gradient(x.shape)

    @nnx.jit
    def pure(module, x, w):
        def pairing(module, x, w):
            return jnp.sum(module(x, ids, w) * grad)

        wrt = (nnx.DiffState(0, nnx.LoRAParam), 1, 2)
        return nnx.grad(pairing, argnums=wrt)(module, x, w)

    dlora, dx, dw = pure(wrapper, jnp.asarray(x), jnp.asarray(w))
    wrapper.forward_sft(x, ids, w)
    grad_input, grads = wrapper.backward(grad)
    assert_close(grad_input, dx, 1e-6)
    assert_close(wrapper.grad_weights, dw, 1e-6)
    for name in LORA_NAMES:
        assert_close(grads[f"grad_{name}"], dlora[name].get_value(), 1e-6)


def test_recompute_policy_gives_the_same_result():
    wrapper = make_wrapper()
    x, ids, w = map(jnp.asarray, inputs())
    for policy in ("save", "recompute"):

        def pairing(x, policy=policy):
            return jnp.sum(wrapper(x, ids, w, activation_policy=policy) ** 2)

        value, grad = jax.value_and_grad(pairing)(x)
        if policy == "save":
            first = value, grad
    assert_close(value, first[0], 1e-6)
    assert_close(grad, first[1], 1e-6)


def test_layers_can_be_stacked_and_scanned():
    """The handle is state, so layers of different weights share one compiled body."""
    layers = [make_wrapper() for _ in range(3)]
    for seed, layer in enumerate(layers):
        layer.load_weights_from_arrays(*base_arrays(seed=20 + seed))
        layer.init_lora_weights(*lora_arrays(seed=70 + seed))
    x, ids, w = inputs()
    graphdef = nnx.split(layers[0])[0]
    stacked = jax.tree.map(
        lambda *leaves: jnp.stack(leaves), *[nnx.split(layer)[1] for layer in layers]
    )

    @jax.jit
    def run(stacked, x):
        def body(x, state):
            return x + nnx.merge(graphdef, state)(x, ids, w), None

        return jax.lax.scan(body, x, stacked)[0]

    expected = jnp.asarray(x)
    for layer in layers:
        expected = expected + layer(expected, ids, w)
    assert_close(run(stacked, jnp.asarray(x)), expected, 1e-6)
