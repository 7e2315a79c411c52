"""Training wrappers of every method: loading, the eager and the pure way to compute."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint_formats import expert_tensors, matrices
from flax import nnx
from quant_cases import encode
from wrapper_support import arguments, assert_close

import ktjax
from ktjax.experts import KTMoEWrapper
from ktjax.experts_sft import AMXSFTMoEWrapper
from ktjax.io import save_file
from ktjax.quant import Encoding

EXPERTS, HIDDEN, INNER = 5, 128, 256
# The encoding that each method gives float weights.
METHODS = {
    "AMXBF16_SFT": Encoding.of("bf16"),
    "AMXINT8_SFT": Encoding.of("int8"),
    "AMXINT4_SFT": Encoding.of("int4"),
    "AMXINT4_KGroup_SFT": Encoding.of("int4_kgroup", 128),
    "AMXFP8_SFT": Encoding.of("fp8_block"),
    "RAWINT4_SFT": Encoding.of("rawint4"),
    "AMXMXFP4_SFT": Encoding.of("mxfp4"),
    "AMXMXFP8_SFT": Encoding.of("mxfp8"),
    "GGUF_SFT": Encoding.of("bf16"),
}
INTEGER = ["AMXINT8_SFT", "AMXINT4_SFT", "AMXINT4_KGroup_SFT"]


def make(method, base=None, **changes):
    sizes = {
        "num_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "lora_rank": 4,
        "lora_alpha": 8.0,
    }
    wrapper = KTMoEWrapper(**arguments(method=method, **{**sizes, **changes}))
    if base is not None:
        wrapper.load_weights_from_arrays(*base)
    return wrapper


def weights():
    return matrices(EXPERTS, HIDDEN, INNER)


def values(wrapper):
    return wrapper._loaded().store.dequantize()


def assert_encoded(wrapper, base, encoding):
    assert wrapper._loaded().store.geometry == (
        encoding.format,
        EXPERTS,
        HIDDEN,
        INNER,
        *encoding[1:],
        *(None, None),
    )
    for got, w in zip(values(wrapper), base, strict=True):
        want = ktjax.quant.decode(encode(w, encoding), encoding.format)
        np.testing.assert_array_equal(got, want)


def tokens(count=9):
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.standard_normal((count, HIDDEN)), jnp.bfloat16)
    ids = np.stack([rng.permutation(EXPERTS)[:2] for _ in range(count)])
    ids[-1, -1] = -1
    w = rng.uniform(0.2, 1.0, ids.shape).astype(np.float32)
    return x, jnp.asarray(ids, jnp.int32), jnp.asarray(w)


def test_methods_are_those_of_the_class():
    assert AMXSFTMoEWrapper.METHODS.keys() == METHODS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_way_to_compute(method):
    wrapper = make(method, weights())
    assert_encoded(wrapper, weights(), METHODS[method])
    x, ids, w = tokens()
    base = tuple(jnp.asarray(v) for v in values(wrapper))
    assert_close(
        wrapper.forward_sft(x, ids, w, save_for_backward=False),
        ktjax.reference.moe(x, ids, w, *base),
    )
    wrapper.init_lora_weights(rngs=nnx.Rngs(0))
    for name in ("gate", "up", "down"):
        b = getattr(wrapper, f"{name}_lora_b")
        b.set_value(0.05 * jax.random.normal(jax.random.key(1), b.shape))
    wrapper.update_lora_weights()

    pure = wrapper(x, ids, w)
    eager = wrapper.forward_sft(x, ids, w)
    registered = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    np.testing.assert_array_equal(eager, pure)
    np.testing.assert_array_equal(registered, pure)
    recomputed = wrapper(x, ids, w, activation_policy="recompute")
    np.testing.assert_array_equal(recomputed, pure)

    def layer(x, w, lora):
        x = x.astype(jnp.float32)
        return ktjax.reference.moe(x, ids, w, *base, lora, scaling=wrapper.lora_scaling)

    y, pullback = jax.vjp(layer, x, w, wrapper.lora)
    assert_close(pure, y)
    grad_y = jax.random.normal(jax.random.key(2), y.shape, jnp.bfloat16)
    grad_x, grad_w, grad_lora = pullback(grad_y.astype(jnp.float32))
    got_x, got_lora = wrapper.backward(grad_y)
    assert_close(got_x, grad_x)
    assert_close(wrapper.grad_weights, grad_w)
    for got, want in zip(got_lora.values(), grad_lora.arrays(), strict=True):
        assert_close(got, want)
    wrapper.close()


@pytest.mark.parametrize("method", INTEGER)
def test_int8_in_every_way_to_compute(method):
    wrapper = make(method, weights(), compute="int8")
    wrapper.init_lora_weights(rngs=nnx.Rngs(0))
    x, ids, w = tokens()
    pure = wrapper(x, ids, w)
    np.testing.assert_array_equal(wrapper.forward_sft(x, ids, w), pure)
    np.testing.assert_array_equal(
        wrapper.forward_sft(x, ids, w, save_for_backward=False), pure
    )
    assert np.asarray(make(method, weights())(x, ids, w) != pure).any()
    base = values(wrapper)
    assert_close(pure, ktjax.reference.moe(x, ids, w, *base), 0.03)
    wrapper.close()


def test_options_of_groups():
    base = weights()
    for size, zeros in ((32, False), (64, True), (128, True)):
        wrapper = make("AMXINT4_KGroup_SFT", base, group_size=size, zero_point=zeros)
        assert_encoded(wrapper, base, Encoding.of("int4_kgroup", size, zeros))
        wrapper.close()


def test_options_are_checked_first():
    with pytest.raises(ValueError, match="AMXINT8_SFT: group_size: expected None"):
        make("AMXINT8_SFT", group_size=32)
    with pytest.raises(ValueError, match=r"one of \[32, 64, 128\] .* got 16"):
        make("AMXINT4_KGroup_SFT", group_size=16)
    with pytest.raises(ValueError, match="zero_point: format 'mxfp4' has none"):
        make("AMXMXFP4_SFT", zero_point=True)
    with pytest.raises(ValueError, match="AMXBF16_SFT: compute: 'int8' needs"):
        make("AMXBF16_SFT", compute="int8")


@pytest.mark.parametrize(
    ("method", "encoding"),
    [
        *((m, e) for m, e in METHODS.items() if e.format != "bf16"),
        ("AMXFP8_SFT", Encoding.of("fp8_channel")),
        ("AMXINT4_KGroup_SFT", Encoding.of("int4_kgroup", 32, True)),
    ],
)
def test_quantised_arrays(method, encoding):
    base = weights()
    order = [4, 0, 0, 1, 3]
    wrapper = make(method)
    wrapper.load_weights_from_arrays(*(encode(w, encoding) for w in base), order)
    assert_encoded(wrapper, [w[order] for w in base], encoding)
    # Loading again replaces them.
    wrapper.load_weights_from_arrays(*(encode(w, encoding) for w in base))
    assert_encoded(wrapper, base, encoding)
    wrapper.close()


def test_bad_quantised_arrays():
    wrapper = make("AMXINT8_SFT")
    arrays = [encode(w, Encoding.of("int8")) for w in weights()]
    wide = [encode(w, Encoding.of("int8")) for w in matrices(EXPERTS, HIDDEN, 288)]
    with pytest.raises(ValueError, match=r"gate of layer 0 must have shape \(5, 256\)"):
        wrapper.load_weights_from_arrays(wide[0], *arrays[1:])
    bad = arrays[2]._replace(scales=arrays[2].scales.astype(np.int8))
    with pytest.raises(TypeError, match="scales: expected float32, got int8"):
        wrapper.load_weights_from_arrays(*arrays[:2], bad)
    with pytest.raises(ValueError, match="format 'bf16' has no scales"):
        make("AMXBF16_SFT").load_weights_from_arrays(*arrays)


def load(path, method, **changes):
    wrapper = make(method, weight_path=str(path), **changes)
    wrapper.load_weights()
    return wrapper


@pytest.mark.parametrize("method", [m for m in METHODS if m != "GGUF_SFT"])
def test_checkpoints_in_bfloat16(tmp_path, method):
    base = weights()
    path = tmp_path / "m.safetensors"
    save_file(path, expert_tensors(base, Encoding.of("bf16")))
    wrapper = load(path, method)
    rounded = [np.asarray(jnp.asarray(w, jnp.bfloat16), np.float32) for w in base]
    assert_encoded(wrapper, rounded, METHODS[method])
    wrapper.close()


@pytest.mark.parametrize(
    ("method", "encoding"),
    [
        ("AMXINT8_SFT", Encoding.of("int8")),
        ("AMXINT4_SFT", Encoding.of("int4")),
        ("AMXINT4_KGroup_SFT", Encoding.of("int4_kgroup", 64)),
        ("AMXFP8_SFT", Encoding.of("fp8_block")),
        ("AMXFP8_SFT", Encoding.of("fp8_channel")),
        ("RAWINT4_SFT", Encoding.of("rawint4")),
        ("AMXMXFP4_SFT", Encoding.of("mxfp4")),
        ("AMXMXFP8_SFT", Encoding.of("mxfp8")),
    ],
)
def test_checkpoints_in_the_method_s_format(tmp_path, method, encoding, recwarn):
    base = weights()
    path = tmp_path / "m.safetensors"
    save_file(path, expert_tensors(base, encoding))
    wrapper = load(path, method)
    assert_encoded(wrapper, base, encoding)
    assert not [w for w in recwarn if "quantised again" in str(w.message)]
    wrapper.close()


def test_checkpoints_in_another_format(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file(path, expert_tensors(weights(), Encoding.of("rawint4")))
    groups = load(path, "AMXINT4_KGroup_SFT")
    assert groups._loaded().store.group_size == 32
    exact = values(groups)
    with pytest.warns(UserWarning, match="layer 0: experts stored as rawint4"):
        wrapper = load(path, "AMXINT4_KGroup_SFT", group_size=64)
    assert_encoded(wrapper, exact, Encoding.of("int4_kgroup", 64))
    with pytest.warns(UserWarning, match="quantised again as int8"):
        wrapper = load(path, "AMXINT8_SFT")
    assert_encoded(wrapper, exact, Encoding.of("int8"))


@pytest.mark.parametrize("method", ["AMXINT4_SFT", "RAWINT4_SFT"])
def test_a_jitted_step_learns(method):
    """Grad and optimizer through the wrapper as through a BF16 one."""
    wrapper = make(method, weights())
    wrapper.init_lora_weights(rngs=nnx.Rngs(0))
    x, ids, w = tokens(32)
    target = 0.1 * jax.random.normal(jax.random.key(0), x.shape)

    @nnx.jit
    def step(wrapper):
        def loss(wrapper):
            return jnp.mean((wrapper(x, ids, w).astype(jnp.float32) - target) ** 2)

        argnums = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=argnums)(wrapper)
        state = nnx.state(wrapper, nnx.LoRAParam)
        nnx.update(wrapper, jax.tree.map(lambda p, g: p - 0.3 * g, state, grads))
        return value

    losses = [float(step(wrapper)) for _ in range(10)]
    assert losses[-1] < 0.98 * losses[0]
    wrapper.close()
