"""Stores of projections: exact values, memory, errors."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from quant_cases import QUANTIZED, encode, encoding_id, gaussian, options

import ktjax
from ktjax import backend, quant
from ktjax.config import PoolConfig


@pytest.mark.parametrize("subpools", [1, 3])
def test_bfloat16_values_are_kept(use_pool, subpools):
    use_pool(threads=2, subpools=subpools)
    weight = gaussian((300, 41))
    rounded = weight.astype(ml_dtypes.bfloat16)
    for given in (weight, rounded, jnp.asarray(rounded), np.asfortranarray(weight)):
        with ktjax.LinearStore.from_array(given) as store:
            np.testing.assert_array_equal(
                store.dequantize(), rounded.astype(np.float32)
            )


@pytest.mark.parametrize("subpools", [1, 2])
@pytest.mark.parametrize("encoding", QUANTIZED, ids=encoding_id)
def test_quantised_values_are_those_of_the_codec(use_pool, encoding, subpools):
    """Of more than one unit of 128 outputs, encoded by the store and given to it."""
    use_pool(threads=2, subpools=subpools)
    weight = gaussian((300, 256), std=0.1)
    quantised = encode(weight, encoding)
    want = quant.decode(quantised, encoding.format)
    for given in (weight, quantised):
        with ktjax.LinearStore.from_array(given, **options(encoding)) as store:
            np.testing.assert_array_equal(store.dequantize(), want)
            assert store.format == encoding.format
            assert store.group_size == encoding.group_size
            assert store.zero_point == encoding.zero_point


def test_group_size_and_packing_are_taken_from_quantised_arrays(use_pool):
    use_pool()
    weight = gaussian((64, 128))
    q = quant.encode(weight, "int4_kgroup", group_size=32, zero_point=True)
    words = q._replace(values=q.values.view(np.int32))
    for given in (q, words):
        with ktjax.LinearStore.from_array(given, format="int4_kgroup") as store:
            assert (store.group_size, store.zero_point) == (32, True)
            assert (store.out_features, store.in_features) == (64, 128)


def test_memory_is_that_of_the_format(use_pool):
    """Within 1.10 of the format's own bytes."""
    use_pool()
    weight = gaussian((1024, 2048))
    for name in ("bf16", "int8", "int4", "fp8_block"):
        own = quant.Encoding.of(name).nbytes(*weight.shape)
        with ktjax.LinearStore.from_array(weight, format=name) as store:
            assert own <= store.nbytes <= 1.1 * own, name


def test_wrong_weights(use_pool):
    use_pool()
    make = ktjax.LinearStore.from_array
    weight = gaussian((300, 64))
    with pytest.raises(ValueError, match=r"LinearStore: format: expected one of"):
        make(weight, format="int3")
    with pytest.raises(ValueError, match=r"weight: expected \[out, in\], sizes > 0"):
        make(weight[None])
    with pytest.raises(ValueError, match=r"weight: expected \[out, in\], sizes > 0"):
        make(weight[:0])
    with pytest.raises(TypeError, match="expected float32 or bfloat16, got float64"):
        make(weight.astype(np.float64))
    with pytest.raises(ValueError, match="in_features: expected a multiple of the gro"):
        make(weight, format="int4_kgroup", group_size=128)
    with pytest.raises(ValueError, match="expected the running pool"):
        make(weight, pool=backend.Pool(PoolConfig(7), "portable"))
    bad = weight.copy()
    bad[200, 3] = np.inf
    with pytest.raises(ValueError, match="linear weights: NaN or Inf in row 200"):
        make(bad, format="int8")
    make(bad).close()  # bfloat16 keeps it

    q = quant.encode(weight, "int8")
    with pytest.raises(ValueError, match="'bf16' has no scales"):
        make(q)
    with pytest.raises(ValueError, match="scales: expected shape"):
        make(q._replace(scales=q.scales[:-1]), format="int8")
    scales = q.scales.copy()
    scales[7] = np.nan
    with pytest.raises(ValueError, match="scales: expected finite numbers"):
        make(q._replace(scales=scales), format="int8")


def test_blocks_of_gguf_are_refused():
    weight = np.zeros((32, 256), np.float32)
    with pytest.raises(ValueError, match=r"format: expected one of .*got 'q8_0'"):
        ktjax.LinearStore.from_array(weight, format="q8_0")
