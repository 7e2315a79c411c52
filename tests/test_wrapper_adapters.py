"""The training wrapper's adapters, weights, sync step, and who owns what."""

import copy
import gc
import pickle
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from wrapper_support import (
    EXPERTS,
    HIDDEN,
    LORA_SHAPES,
    assert_close,
    base_arrays,
    inputs,
    lora_arrays,
    make_wrapper,
    record_registrations,
    reference,
    refuses,
)

from ktjax import experts_state
from ktjax.experts_sft_base import LORA_NAMES
from ktjax.io.safetensors import save_file


def test_adapters_are_lora_params():
    wrapper = make_wrapper()
    params = nnx.state(wrapper, nnx.LoRAParam)
    assert sorted(nnx.to_pure_dict(params)) == sorted(LORA_NAMES)
    for name, given in zip(LORA_NAMES, lora_arrays(), strict=True):
        param = getattr(wrapper, name)
        assert type(param) is nnx.LoRAParam
        np.testing.assert_array_equal(param.get_value(), given)
    others = jax.tree.leaves(nnx.state(wrapper, nnx.Not(nnx.LoRAParam)))
    assert [leaf.dtype for leaf in others] == [jnp.uint32]


@pytest.mark.parametrize("position", range(6))
def test_shape_errors_name_the_array(position):
    wrapper = make_wrapper(lora=False)
    name = LORA_NAMES[position]
    arrays = lora_arrays()
    arrays[position] = arrays[position][:, :, :-1]
    expected = LORA_SHAPES[name]
    got = (*expected[:-1], expected[-1] - 1)
    with refuses(ValueError, f"{name} shape mismatch: expected {expected}, got {got}"):
        wrapper.init_lora_weights(*arrays)
    assert wrapper.lora is None


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (np.float16, jnp.float32),
        (np.float64, jnp.float32),
        (np.int64, jnp.float32),
        (np.float32, jnp.float32),
        (ml_dtypes.bfloat16, jnp.bfloat16),
    ],
)
def test_other_dtypes_are_converted(given, kept):
    wrapper = make_wrapper(lora=False)
    arrays = [np.round(9 * array).astype(given) for array in lora_arrays()]
    wrapper.init_lora_weights(*arrays)
    for value, array in zip(wrapper.lora.arrays(), arrays, strict=True):
        assert value.dtype == kept
        np.testing.assert_array_equal(
            np.asarray(value, np.float64), array.astype(np.float64)
        )


def test_mixed_dtypes_become_float32_and_complex_is_refused():
    wrapper = make_wrapper(lora=False)
    arrays = lora_arrays(dtype=ml_dtypes.bfloat16)
    wrapper.init_lora_weights(arrays[0].astype(np.float32), *arrays[1:])
    assert {str(a.dtype) for a in wrapper.lora.arrays()} == {"float32"}
    arrays[4] = arrays[4].astype(np.complex64)
    with refuses(
        ValueError,
        "init_lora_weights: down_lora_a must hold real numbers, got complex64",
    ):
        wrapper.init_lora_weights(*arrays)


def test_random_adapters():
    wrapper = make_wrapper(lora=False)
    wrapper.init_lora_weights(rngs=nnx.Rngs(0))
    for name, value in zip(LORA_NAMES, wrapper.lora.arrays(), strict=True):
        assert value.shape == LORA_SHAPES[name]
        assert value.dtype == jnp.float32
        largest = float(jnp.abs(value).max())
        if name.endswith("_b"):
            assert largest == 0.0
        else:
            # Kaiming-uniform with a = √5: uniform within 1/√in.
            bound = value.shape[-1] ** -0.5
            assert 0.9 * bound < largest <= bound
            assert abs(float(value.std()) - bound / 3**0.5) < 0.1 * bound
    again = make_wrapper(lora=False)
    again.init_lora_weights(rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(again.lora.up_a, wrapper.lora.up_a)
    assert (wrapper.lora.up_a != wrapper.lora.gate_a).any()
    x, ids, w = inputs()
    # B = 0: the adapted model begins as the base model.
    assert_close(wrapper.forward_sft(x, ids, w), reference(x, ids, w, None, 1.0))


def test_init_wants_all_arrays_or_rngs():
    wrapper = make_wrapper(lora=False)
    with pytest.raises(ValueError, match=r"got 0 arrays.*rngs not given"):
        wrapper.init_lora_weights()
    with pytest.raises(ValueError, match=r"5 arrays \(missing: \['down_lora_b'\]\)"):
        wrapper.init_lora_weights(*lora_arrays()[:-1])
    with pytest.raises(ValueError, match=r"got 6 arrays.*rngs given"):
        wrapper.init_lora_weights(*lora_arrays(), rngs=nnx.Rngs(0))


def test_init_again_keeps_the_parameter_objects():
    wrapper = make_wrapper()
    param = wrapper.up_lora_b
    wrapper.init_lora_weights(*lora_arrays(seed=5))
    assert wrapper.up_lora_b is param
    np.testing.assert_array_equal(param.get_value(), lora_arrays(seed=5)[3])


class ForeignTensor:
    """A tensor as another library would hand it over: DLPack, and to be detached."""

    def __init__(self, array, live=True):
        self.array, self.live = array, live
        self.dtype = f"foreign.{array.dtype}"

    def detach(self):
        return ForeignTensor(self.array, live=False)

    def cpu(self):
        return self

    def contiguous(self):
        return self

    def __dlpack__(self, **options):
        assert not self.live, "needs gradients, detach it first"
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_foreign_tensors_are_taken():
    wrapper = make_wrapper(lora=False)
    own = make_wrapper()
    arrays = lora_arrays()
    wrapper.init_lora_weights(*map(ForeignTensor, arrays))
    x, ids, w = inputs()
    y = wrapper.forward_sft(*map(ForeignTensor, (x, ids.astype(np.int64), w)))
    np.testing.assert_array_equal(y, own.forward_sft(x, ids, w))
    expected, _ = own.backward(x)
    np.testing.assert_array_equal(wrapper.backward(ForeignTensor(x))[0], expected)
    arrays[0][...] = 0
    assert wrapper.lora.gate_a.any(), "the wrapper must own its adapters"
    half = jnp.asarray(x, jnp.bfloat16)
    y = wrapper.forward_sft(ForeignTensor(half), ids, w, save_for_backward=False)
    assert y.dtype == jnp.bfloat16


def test_torch_tensors_are_taken():
    torch = pytest.importorskip("torch")
    wrapper = make_wrapper(lora=False)
    wrapper.init_lora_weights(
        *(torch.tensor(a).bfloat16().requires_grad_() for a in lora_arrays())
    )
    assert wrapper.lora.up_a.dtype == jnp.bfloat16
    x, ids, w = inputs()
    y = wrapper.forward_sft(
        torch.tensor(x).bfloat16(), torch.tensor(ids).long(), torch.tensor(w)
    )
    expected = reference(jnp.asarray(x, jnp.bfloat16), ids, w, wrapper.lora, 2.0)
    assert_close(y, expected, 0.006 + 2**-9)


def test_sync_registers_the_present_arrays(monkeypatch):
    registrations = record_registrations(monkeypatch)
    wrapper = make_wrapper()
    assert len(registrations) == 1
    wrapper.update_lora_weights()
    assert len(registrations) == 2
    lora, scaling = registrations[-1]
    assert scaling == 2.0
    for registered, name in zip(lora.arrays(), LORA_NAMES, strict=True):
        assert registered is getattr(wrapper, name).get_value()


def test_adapters_before_weights_are_registered_on_loading(monkeypatch):
    registrations = record_registrations(monkeypatch)
    wrapper = make_wrapper(weights=False)
    assert registrations == []
    wrapper.load_weights_from_arrays(*base_arrays())
    assert len(registrations) == 1


def test_changed_adapters_are_never_missed(monkeypatch):
    registrations = record_registrations(monkeypatch)
    wrapper = make_wrapper()
    x, ids, w = inputs()
    stale = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert len(registrations) == 1, "nothing changed, so nothing is registered again"
    wrapper.up_lora_b.set_value(wrapper.up_lora_b.get_value() + 1.0)
    fresh = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert len(registrations) == 2
    assert_close(fresh, reference(x, ids, w, wrapper.lora, 2.0))
    assert np.abs(np.asarray(fresh - stale)).max() > 0.1


def checkpoint(path, layer):
    """A checkpoint whose layer `layer` holds `base_arrays()`, in logical order."""
    tensors = {}
    for name, stacked in zip(("gate", "up", "down"), base_arrays(), strict=True):
        for expert in range(EXPERTS):
            key = f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
            tensors[key] = stacked[expert]
    save_file(path, tensors)


@pytest.mark.parametrize("order", [None, [3, 0, 4, 1, 2], [0, 0, 1, 2, 4]])
def test_load_weights_from_a_checkpoint(tmp_path, order):
    path = tmp_path / "model.safetensors"
    checkpoint(path, layer=2)
    slots = list(range(EXPERTS)) if order is None else order
    expected = [array[slots] for array in base_arrays()]
    x, ids, w = inputs()
    for place in (path, tmp_path):
        wrapper = make_wrapper(weights=False, weight_path=str(place), layer_idx=2)
        wrapper.load_weights(None if order is None else np.array(order, np.int64))
        y = wrapper.forward_sft(x, ids, w)
        assert_close(y, reference(x, ids, w, wrapper.lora, 2.0, expected))
    wrapper.load_weights_from_arrays(*base_arrays(), physical_to_logical_map=order)
    again = wrapper.forward_sft(x, ids, w, save_for_backward=False)
    assert_close(again, y, 1e-6)


def test_load_weights_errors(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint(path, layer=2)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        make_wrapper(weights=False, weight_path="nowhere").load_weights()
    wrapper = make_wrapper(weights=False, weight_path=path, layer_idx=1)
    with pytest.raises(KeyError, match="layer 1 has no routed experts"):
        wrapper.load_weights(None)
    for order, message in (
        ([0, 1, 2], "must be 5 integers, got int64 of shape (3,)"),
        (np.zeros(5), "must be 5 integers, got float64 of shape (5,)"),
        ([0, 1, 2, 3, 5], "must be within 0..4, got 0..5"),
        ([0, 1, 2, 3, -1], "must be within 0..4, got -1..3"),
    ):
        message = f"load_weights: physical_to_logical_map {message}"
        with refuses(ValueError, message):
            wrapper.load_weights(order)
        with refuses(ValueError, message):
            wrapper.load_weights_from_arrays(*base_arrays(), order)
    wide = make_wrapper(
        weights=False, lora=False, weight_path=path, layer_idx=2, hidden_size=HIDDEN + 1
    )
    with refuses(
        ValueError,
        "load_weights: gate of layer 2 must have shape (5, 40, 25), got (5, 40, 24)",
    ):
        wide.load_weights()


@pytest.mark.parametrize("position", range(3))
def test_wrong_array_shapes_are_named(position):
    arrays = base_arrays()
    name = ("gate", "up", "down")[position]
    shape = arrays[position].shape
    arrays[position] = arrays[position][:, :-1]
    wrapper = make_wrapper(weights=False)
    with refuses(
        ValueError,
        f"load_weights: {name} of layer 0 must have shape {shape}, "
        f"got {arrays[position].shape}",
    ):
        wrapper.load_weights_from_arrays(*arrays)
    assert not wrapper._weights_loaded


def test_loading_again_replaces_the_weights():
    wrapper = make_wrapper()
    other = base_arrays(seed=30)
    wrapper.load_weights_from_arrays(*other)
    x, ids, w = inputs()
    expected = reference(x, ids, w, wrapper.lora, 2.0, other)
    for save in (True, False):
        assert_close(wrapper.forward_sft(x, ids, w, save), expected)


def test_closed_wrapper():
    wrapper = make_wrapper()
    x, ids, w = inputs()
    wrapper.forward_sft(x, ids, w)
    twin = nnx.clone(wrapper)
    wrapper.close()
    wrapper.close()
    message = "This wrapper is closed. Call load_weights() to load its weights again."
    for module in (wrapper, twin):
        for call in (
            lambda module=module: module.forward_sft(x, ids, w),
            lambda module=module: module.backward(x),
            lambda module=module: module.update_lora_weights(),
            lambda module=module: module(x, ids, w),
        ):
            with refuses(RuntimeError, message):
                call()
    assert wrapper.lora.up_a.any()
    wrapper.load_weights_from_arrays(*base_arrays())
    assert wrapper.forward_sft(x, ids, w).shape == x.shape


def test_close_before_loading_is_allowed():
    make_wrapper(weights=False).close()


def test_jit_caches_do_not_keep_the_weights():
    wrapper = make_wrapper()
    call = nnx.jit(lambda module, x, ids, w: module(x, ids, w))
    x, ids, w = inputs()
    call(wrapper, x, ids, w)
    wrapper.forward_sft(x, ids, w)
    loaded = weakref.ref(experts_state.eager_state(wrapper).loaded)
    twin = nnx.clone(wrapper)
    twin.forward_sft(x, ids, w, save_for_backward=False)
    del wrapper
    gc.collect()
    assert loaded() is not None, "the clone is an owner too"
    assert_close(call(twin, x, ids, w), reference(x, ids, w, twin.lora, 2.0))
    graphdef, state = nnx.split(twin)
    del twin
    gc.collect()
    assert loaded() is None
    orphan = nnx.merge(graphdef, state)
    with pytest.raises(RuntimeError, match=r"weights behind this wrapper are gone"):
        orphan.forward_sft(x, ids, w)
    with pytest.raises(RuntimeError, match=r"weights behind this wrapper are gone"):
        orphan(x, ids, w)


@pytest.mark.parametrize("duplicate", [nnx.clone, copy.deepcopy])
def test_copies_share_weights_and_nothing_else(duplicate):
    wrapper = make_wrapper()
    x, ids, w = inputs()
    wrapper.forward_sft(x, ids, w)
    twin = duplicate(wrapper)
    assert twin._cache_depth == 0
    twin.init_lora_weights(*lora_arrays(seed=40))
    for module in (wrapper, twin, wrapper):
        y = module.forward_sft(x, ids, w, save_for_backward=False)
        assert_close(y, reference(x, ids, w, module.lora, 2.0))
    assert wrapper._cache_depth == 1


def test_pickling_says_what_to_do():
    with pytest.raises(TypeError, match=r"cannot be pickled.*nnx\.LoRAParam"):
        pickle.dumps(make_wrapper())
