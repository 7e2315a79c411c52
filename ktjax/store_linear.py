"""The weights of one frozen projection, in host memory, behind a handle."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ktjax import _native, backend
from ktjax.quant.formats import (
    BLOCK_FORMATS,
    ENCODED_FORMATS,
    FORMATS,
    Encoding,
    Quantized,
)
from ktjax.quant.plain import check_quantized, group_of
from ktjax.store_base import FrozenStore, check_pool

Array = Any

_WHERE = "LinearStore"


class LinearGeometry(NamedTuple):
    """The static facts of a store; hashable."""

    format: str
    out_features: int
    in_features: int
    group_size: int = 0
    zero_point: bool = False


@jax.tree_util.register_pytree_node_class
class LinearStore(FrozenStore):
    """Frozen weights of a projection, packed once for both passes of `ktjax.linear`.

    A pytree with one leaf, its `handle`; see `FrozenStore`. The store that `from_array`
    returned owns the memory.

    Attributes:
      handle: `uint32[2]`, the name of the native store in this process.
      format: the storage format, a name in `ktjax.quant.FORMATS`.
      group_size: depths that share a scale; 0 = a whole row does, or there is none.
      zero_point: whether the groups have zero points.
      out_features: outputs.
      in_features: inputs.
    """

    _geometry: LinearGeometry

    @classmethod
    def from_array(
        cls,
        weight: Array | Quantized,
        *,
        format: str = "bf16",
        group_size: int | None = None,
        zero_point: bool = False,
        pool: backend.Pool | None = None,
    ) -> LinearStore:
        """Packs a matrix, quantising it if need be.

        The weight may be a NumPy (also memory-mapped) or JAX array, float32 or
        bfloat16, encoded as `ktjax.quant.encode` does ("bf16" rounds to nearest even);
        or `ktjax.Quantized`, whose codes and scales are kept as they are. It is not
        needed afterwards. Magnitudes below 2^-126 count as zero.

        Args:
          weight: `[out, in]`, as torch's and Hugging Face's linear layers have it; or
            the plain arrays of such a matrix, without a dimension for experts.
          format: storage format, a name in `ktjax.quant.FORMATS`.
          group_size: for int4_kgroup: 32, 64 or 128 depths to a scale. None = 128, or
            what the quantised arrays have.
          zero_point: for int4_kgroup: quantise with zero points. Quantised arrays have
            them if `zeros` is given.
          pool: the pool to use; None starts the default one if none is running.

        Raises:
          ValueError: an unknown format or an option that it does not have; a wrong
            shape; inputs that groups do not divide; NaN or Inf in a weight to be
            quantised (bfloat16 keeps them); scales that are NaN, infinite or negative;
            NaN codes; or not the running pool.
          TypeError: a wrong dtype.
          MemoryError: the weight does not fit.
        """
        # Before anything starts a pool: a typing error must not.
        Encoding.of(format, group_size, zero_point, where=_WHERE)
        if format in BLOCK_FORMATS:
            raise ValueError(
                f"{_WHERE}: format: expected one of {list(ENCODED_FORMATS)}, got "
                f"{format!r}; GGUF's blocks are formats of experts only"
            )
        check_pool(pool, where=_WHERE)
        check = _check_plain if isinstance(weight, Quantized) else _check
        geometry, arrays = check(weight, format, group_size, zero_point)
        # 0 where the format fixes the group.
        chosen = geometry.group_size if FORMATS[format].group_sizes else 0
        words = _native.create_linear(
            format,
            chosen,
            geometry.zero_point,
            geometry.out_features,
            geometry.in_features,
            [backend.native_bits(array) for array in arrays],
        )
        return cls._own(words, geometry)

    @property
    def geometry(self) -> LinearGeometry:
        """Format and sizes; hashable."""
        return self._geometry

    @property
    def out_features(self) -> int:
        """Outputs."""
        return self._geometry.out_features

    @property
    def in_features(self) -> int:
        """Inputs."""
        return self._geometry.in_features

    def dequantize(self) -> np.ndarray:
        """The exact values that the kernels use, `[out, in]` in float32.

        They are those of `ktjax.quant.decode` on the same codes and scales: bfloat16
        values, in forward and backward alike.
        """
        values = np.empty((self.out_features, self.in_features), np.float32)
        _native.linear_dequantize(*self.words(), values)
        return values


def _check(
    weight: Array, format: str, group_size: int | None, zero_point: bool
) -> tuple[LinearGeometry, list[np.ndarray]]:
    """The geometry of a weight to encode, and what the native library takes."""
    array = np.asarray(weight)
    if array.ndim != 2 or 0 in array.shape:
        raise ValueError(
            f"{_WHERE}: weight: expected [out, in], sizes > 0, got shape {array.shape}"
        )
    if array.dtype not in (np.float32, jnp.bfloat16):
        raise TypeError(
            f"{_WHERE}: weight: expected float32 or bfloat16, got {array.dtype}; "
            "already quantised weights go in as ktjax.Quantized"
        )
    encoding = Encoding.of(format, group_size, zero_point, where=_WHERE)
    return _geometry(encoding, *array.shape), [array]


def _check_plain(
    weight: Quantized, format: str, group_size: int | None, zero_point: bool
) -> tuple[LinearGeometry, list[np.ndarray]]:
    """As `_check`, for a weight that is already quantised."""
    if FORMATS[format].scale is None:
        raise ValueError(
            f"{_WHERE}: weight: format {format!r} has no scales: expected an array, "
            "got ktjax.Quantized; give the format of the quantised arrays"
        )
    shape = np.shape(weight.values)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(
            f"{_WHERE}: weight: values: expected 2 dimensions > 0, got shape {shape}"
        )
    outputs, width = shape
    inputs = width * _depths_per_element(weight.values, FORMATS[format].bits)
    one = Quantized(*(None if a is None else np.asarray(a)[None] for a in weight))
    if FORMATS[format].group_sizes and group_size is None:
        group_size = group_of(one, inputs)
    zero_point = zero_point or weight.zeros is not None
    encoding = Encoding.of(format, group_size, zero_point, where=_WHERE)
    plain = check_quantized(one, encoding, outputs, inputs, where=f"{_WHERE}: weight")
    arrays = [array for array in plain if array is not None]
    return _geometry(encoding, outputs, inputs), arrays


def _depths_per_element(values: Array, bits: int) -> int:
    """How many 4-bit codes an element holds; an even number of inputs, then."""
    if bits > 4:
        return 1
    return 2 * np.dtype(values.dtype).itemsize


def _geometry(encoding: Encoding, outputs: int, inputs: int) -> LinearGeometry:
    encoding.check_depth(inputs, where=f"{_WHERE}: in_features")
    return LinearGeometry(
        encoding.format, outputs, inputs, encoding.group_size, encoding.zero_point
    )
