"""The base weights of one layer of experts, in host memory, behind a handle."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ktjax import _native, backend
from ktjax.quant.formats import BLOCK_FORMATS, FORMATS, Encoding, Quantized
from ktjax.quant.plain import check_quantized, group_of
from ktjax.store_base import FrozenStore, check_pool

Array = Any

_NAMES = ("gate", "up", "down")


class Geometry(NamedTuple):
    """The static facts of a store: what shapes and residuals depend on; hashable.

    `down_format` and `up_format` are the formats of down and up where they are others
    than gate's, else None.
    """

    format: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    group_size: int = 0
    zero_point: bool = False
    down_format: str | None = None
    up_format: str | None = None


@jax.tree_util.register_pytree_node_class
class ExpertStore(FrozenStore):
    """Frozen weights of a layer's routed experts, packed once for both passes.

    A pytree with one leaf, its `handle`; see `FrozenStore`. The store that
    `from_arrays` returned owns the memory.

    Attributes:
      handle: `uint32[2]`, the name of the native store in this process.
      format: the storage format, a name in `ktjax.quant.FORMATS`.
      group_size: depths that share a scale; 0 = a whole row does, or there is none.
      zero_point: whether the groups have zero points.
      up_format: the format of up; as `format`, but GGUF files mix them.
      down_format: the format of down, likewise.
      num_experts: experts of the layer.
      hidden_size: width of the residual stream.
      intermediate_size: width of an expert.
    """

    _geometry: Geometry

    @classmethod
    def from_arrays(
        cls,
        gate: Array | Quantized,
        up: Array | Quantized,
        down: Array | Quantized,
        *,
        format: str = "bf16",
        group_size: int | None = None,
        zero_point: bool = False,
        up_format: str | None = None,
        down_format: str | None = None,
        pool: backend.Pool | None = None,
    ) -> ExpertStore:
        """Packs the weights of all experts, quantising them if need be.

        Weights may be NumPy (also memory-mapped) or JAX arrays, float32 or bfloat16.
        They are encoded by the rules in docs/formats.md, with the bits of
        `ktjax.quant.encode`; "bf16" rounds to nearest even. Or all three are
        `ktjax.Quantized`: the plain arrays of the format, whose codes and scales are
        kept as they are. The formats of GGUF are always given so, in the blocks of the
        file. Nothing given is needed afterwards.

        Magnitudes below 2^-126 count as zero, in weights, scales and values. A scale of
        zero makes its weights zero.

        Args:
          gate: `[experts, intermediate, hidden]`.
          up: `[experts, intermediate, hidden]`.
          down: `[experts, hidden, intermediate]`.
          format: storage format, a name in `ktjax.quant.FORMATS`.
          group_size: for int4_kgroup: 32, 64 or 128 depths to a scale. None = 128, or
            what the quantised arrays have.
          zero_point: for int4_kgroup: quantise with zero points. Quantised arrays have
            them if `zeros` is given.
          up_format: the format of up, where it is another. All must be formats of
            GGUF.
          down_format: the format of down, where it is another. All must be formats of
            GGUF or "bf16".
          pool: the pool to use; None starts the default one if none is running.

        Raises:
          ValueError: an unknown format or an option that it does not have; wrong
            shapes; sizes that groups do not divide; NaN or Inf in weights to be
            quantised (bfloat16 keeps them); scales that are NaN, infinite or, except in
            GGUF's blocks, negative; NaN codes; or not the running pool.
          TypeError: wrong dtypes.
          MemoryError: the weights do not fit.
        """
        # Before anything starts a pool: a typing error must not.
        Encoding.of(format, group_size, zero_point, where="ExpertStore")
        formats = (format, up_format or format, down_format or format)
        _check_mixed(formats)
        check_pool(pool, where="ExpertStore")
        matrices = (gate, up, down)
        if FORMATS[format].block_bytes or len(set(formats)) > 1:
            geometry, arrays = _check_blocks(matrices, formats)
        elif any(isinstance(matrix, Quantized) for matrix in matrices):
            geometry, arrays = _check_plain(matrices, format, group_size, zero_point)
        else:
            geometry, arrays = _check(matrices, format, group_size, zero_point)
        # 0 where the format fixes the group.
        chosen = geometry.group_size if FORMATS[format].group_sizes else 0
        words = _native.create_store(
            format,
            chosen,
            geometry.zero_point,
            *formats[1:],
            *([backend.native_bits(a) for a in matrix] for matrix in arrays),
        )
        return cls._own(words, geometry)

    @property
    def geometry(self) -> Geometry:
        """Format and sizes; hashable."""
        return self._geometry

    @property
    def up_format(self) -> str:
        """The storage format of up: `format`, unless a GGUF file has another."""
        return self._geometry.up_format or self._geometry.format

    @property
    def down_format(self) -> str:
        """The storage format of down: `format`, unless a GGUF file has another."""
        return self._geometry.down_format or self._geometry.format

    @property
    def formats(self) -> tuple[str, str, str]:
        """The storage formats of gate, up and down."""
        return self.format, self.up_format, self.down_format

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self._geometry.num_experts

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self._geometry.hidden_size

    @property
    def intermediate_size(self) -> int:
        """Width of an expert."""
        return self._geometry.intermediate_size

    def dequantize(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The exact values that the kernels use: gate, up and down in float32.

        They are those of `ktjax.quant.decode` on the same codes and scales: bfloat16
        values, in forward and backward alike.
        """
        e, h, i = self.num_experts, self.hidden_size, self.intermediate_size
        words = self.words()
        arrays = (
            np.empty((e, i, h), np.float32),
            np.empty((e, i, h), np.float32),
            np.empty((e, h, i), np.float32),
        )
        _native.store_dequantize(*words, *arrays)
        return arrays


def _check(
    matrices: tuple[Array, ...], format: str, group_size: int | None, zero_point: bool
) -> tuple[Geometry, list[list[np.ndarray]]]:
    """The geometry of weights to encode, and each matrix as the native library's."""
    arrays = [np.asarray(matrix) for matrix in matrices]
    gate, up, down = arrays
    for name, array in zip(_NAMES, arrays, strict=True):
        if array.ndim != 3:
            raise ValueError(
                f"ExpertStore: {name}: expected 3 dimensions, got shape {array.shape}"
            )
        if array.dtype not in (np.float32, jnp.bfloat16):
            raise TypeError(
                f"ExpertStore: {name}: expected float32 or bfloat16, got "
                f"{array.dtype}; already quantised weights go in as ktjax.Quantized"
            )
        if array.dtype != gate.dtype:
            raise TypeError(
                f"ExpertStore: {name}: expected {gate.dtype} like gate, got "
                f"{array.dtype}"
            )
    experts, intermediate, hidden = gate.shape
    if min(gate.shape) == 0:
        raise ValueError(f"ExpertStore: gate: expected sizes > 0, got {gate.shape}")
    for name, array, expected in (
        ("up", up, (experts, intermediate, hidden)),
        ("down", down, (experts, hidden, intermediate)),
    ):
        if array.shape != expected:
            raise ValueError(
                f"ExpertStore: {name}: expected {expected} to match gate "
                f"{gate.shape}, got {array.shape}"
            )
    encoding = Encoding.of(format, group_size, zero_point, where="ExpertStore")
    _check_groups(encoding, hidden, intermediate)
    return _geometry(encoding, experts, hidden, intermediate), [[a] for a in arrays]


def _check_plain(
    matrices: tuple[Array, ...], format: str, group_size: int | None, zero_point: bool
) -> tuple[Geometry, list[list[np.ndarray]]]:
    """As `_check`, for weights that are already quantised."""
    if FORMATS[format].scale is None:
        raise ValueError(
            f"ExpertStore: gate: format {format!r} has no scales: expected arrays, got "
            "ktjax.Quantized; give the format of the quantised arrays"
        )
    for name, matrix in zip(_NAMES, matrices, strict=True):
        if not isinstance(matrix, Quantized):
            raise TypeError(
                f"ExpertStore: {name}: expected ktjax.Quantized like the others, got "
                f"{type(matrix).__name__}"
            )
        if np.ndim(matrix.values) != 3 or 0 in np.shape(matrix.values):
            raise ValueError(
                f"ExpertStore: {name}: values: expected 3 dimensions > 0, got shape "
                f"{np.shape(matrix.values)}"
            )
    gate, _, down = matrices
    # The outputs of gate are the depth of down and the other way round: packed values
    # alone would leave odd depths open.
    experts, intermediate, _ = np.shape(gate.values)
    hidden = np.shape(down.values)[1]
    zero_point = zero_point or gate.zeros is not None
    if FORMATS[format].group_sizes and group_size is None:
        group_size = group_of(gate, hidden)
    encoding = Encoding.of(format, group_size, zero_point, where="ExpertStore")
    _check_groups(encoding, hidden, intermediate)
    arrays = []
    for name, matrix, outputs, depth in (
        ("gate", gate, intermediate, hidden),
        ("up", matrices[1], intermediate, hidden),
        ("down", down, hidden, intermediate),
    ):
        where = f"ExpertStore: {name}"
        plain = check_quantized(matrix, encoding, outputs, depth, where=where)
        if len(plain.values) != experts:
            raise ValueError(
                f"{where}: values: expected {experts} experts like gate, got "
                f"{len(plain.values)}"
            )
        arrays.append([array for array in plain if array is not None])
    return _geometry(encoding, experts, hidden, intermediate), arrays


def _check_mixed(formats: tuple[str, str, str]) -> None:
    """Whether gate, up and down can have these formats in one store."""
    if len(set(formats)) == 1:
        return
    for name, given in zip(
        ("format", "up_format", "down_format"), formats, strict=True
    ):
        # A panel has strips of gate and up: of blocks, or of values.
        blocks_only = name != "down_format" and formats[0] != formats[1]
        allowed = BLOCK_FORMATS if blocks_only else ("bf16", *BLOCK_FORMATS)
        if given not in allowed:
            raise ValueError(
                f"ExpertStore: {name}: formats can only be mixed among "
                f"{list(allowed)}, got {given!r}"
            )


def _check_blocks(
    matrices: tuple[Array | Quantized, ...], formats: tuple[str, str, str]
) -> tuple[Geometry, list[list[np.ndarray]]]:
    """As `_check`, for GGUF's blocks and what is mixed with them."""
    arrays = []
    for name, matrix, chosen in zip(_NAMES, matrices, formats, strict=True):
        where = f"ExpertStore: {name}"
        if isinstance(matrix, Quantized) != (chosen != "bf16"):
            expected = "arrays" if chosen == "bf16" else "ktjax.Quantized"
            raise TypeError(
                f"{where}: expected {expected} in format {chosen!r}, got "
                f"{type(matrix).__name__}"
            )
        array = np.asarray(matrix.values if isinstance(matrix, Quantized) else matrix)
        if array.ndim != 3 or 0 in array.shape:
            raise ValueError(
                f"{where}: expected 3 dimensions > 0, got shape {array.shape}"
            )
        arrays.append(array)
    # Bytes of a row are not its depth, so outputs say what the sizes are.
    experts, intermediate, hidden = *arrays[0].shape[:2], arrays[2].shape[1]
    for name, matrix, array, chosen, outputs, depth in zip(
        *(_NAMES, matrices, arrays, formats),
        (intermediate, intermediate, hidden),
        (hidden, hidden, intermediate),
        strict=True,
    ):
        where = f"ExpertStore: {name}"
        encoding = Encoding.of(chosen, where=where)
        encoding.check_depth(depth, where=f"{where}: depth")
        (shape, dtype) = encoding.shapes(outputs, depth)["values"]
        dtypes = (dtype,) if chosen != "bf16" else (dtype, np.dtype(np.float32))
        if array.dtype not in dtypes:
            raise TypeError(f"{where}: expected {dtype}, got {array.dtype}")
        if isinstance(matrix, Quantized) and any(a is not None for a in matrix[1:]):
            raise ValueError(
                f"{where}: format {chosen!r} has its scales in the blocks: expected "
                "scales and zeros to be None"
            )
        if array.shape != (experts, *shape):
            raise ValueError(
                f"{where}: expected shape {(experts, *shape)} for {experts} experts of "
                f"{outputs} x {depth} in format {chosen!r}, got {array.shape}"
            )
    geometry = _geometry(Encoding.of(formats[0]), experts, hidden, intermediate)
    up, down = (None if other == formats[0] else other for other in formats[1:])
    mixed = geometry._replace(up_format=up, down_format=down)
    return mixed, [[array] for array in arrays]


def _check_groups(encoding: Encoding, hidden: int, intermediate: int) -> None:
    encoding.check_depth(hidden, where="ExpertStore: hidden size")
    encoding.check_depth(intermediate, where="ExpertStore: intermediate size")


def _geometry(
    encoding: Encoding, experts: int, hidden: int, intermediate: int
) -> Geometry:
    return Geometry(
        encoding.format,
        experts,
        hidden,
        intermediate,
        encoding.group_size,
        encoding.zero_point,
    )
