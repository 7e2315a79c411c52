"""ktjax: as a jitted function, the way a training step calls it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import ktjax
from benchmarks import cases, formats
from benchmarks.cases import Case
from benchmarks.contenders import Contender, Prepared
from benchmarks.shapes import Shape
from ktjax import _native, backend
from ktjax.config import PoolConfig
from ktjax.experts_pending import PendingSum

# `chunked_prefill_size` of eager forwards.
CHUNK = 2048


class Ktjax(Contender):
    """bfloat16 x, float32 adapters; weights in bfloat16 and the formats asked for."""

    def __init__(self, threads: int | None = None):
        self._config = PoolConfig(threads) if threads else None
        self.pool = backend.get_pool(self._config)
        self._shape: Shape | None = None
        self._stores: dict[str, ktjax.ExpertStore] = {}
        self._lora: dict[int, ktjax.LoRA] = {}

    def load(self, shape: Shape) -> None:
        self.close()
        self.pool = backend.get_pool(self._config)
        self._shape = shape
        self._add(["bf16"])

    def hold(self, extra: list[str]) -> None:
        """Keeps the same weights in these formats too, and in no others but bf16.

        Cases prepared in a format that goes must not be run again.
        """
        for name in set(self._stores) - {"bf16", *extra}:
            self._stores.pop(name).close()
        self._add([name for name in extra if name not in self._stores])

    def prepare(self, case: Case) -> Prepared:
        if case.format not in self._stores:
            held = ", ".join(self._stores) or "nothing"
            raise RuntimeError(
                f"prepare: expected weights in format {case.format!r}, got {held}: "
                "call load, and hold for formats other than 'bf16'"
            )
        store = self._stores[case.format]
        function = _train if case.pass_name == "train" else _forward
        if case.pass_name == "forward" and case.variant == "eager":
            return _eager(case, store)
        if case.variant not in cases.variants("ktjax", case.pass_name, case.tokens):
            raise ValueError(f"ktjax: no variant {case.variant!r} of {case.pass_name}")
        lora = self._adapters(case) if case.adapted else None
        arguments = []
        for batch in cases.batches(case):
            x, ids, w, grad_y = map(jnp.asarray, batch)
            extra = (grad_y,) if case.pass_name == "train" else ()
            arguments.append((store, lora, x, ids, w, *extra))
        jax.block_until_ready(arguments)
        options = {"activation_policy": case.variant, "compute": case.compute}
        jitted = jax.jit(functools.partial(function, options))
        compiled = jitted.lower(*arguments[0]).compile()

        def call(arguments: tuple[Any, ...]) -> Callable[[], Any]:
            return lambda: jax.block_until_ready(compiled(*arguments))

        return Prepared([call(each) for each in arguments], _named, _result_bytes)

    def close(self) -> None:
        for store in self._stores.values():
            store.close()
        self._stores.clear()
        self._shape = None
        self._lora.clear()
        backend.release_pool()  # and its scratch, so that the next load starts afresh

    def _add(self, names: list[str]) -> None:
        if self._shape is None:
            raise RuntimeError("hold: call load first")
        if not names:
            return
        # Float weights are made once for all formats.
        arrays = dict(cases.weights(self._shape))
        for name in names:
            encoding, down = formats.encodings(name)
            blocks = encoding.spec.block_bytes
            given = formats.weights(self._shape, name) if blocks else arrays
            self._stores[name] = ktjax.ExpertStore.from_arrays(
                **given,
                format=encoding.format,
                group_size=encoding.group_size or None,
                zero_point=encoding.zero_point,
                down_format=down.format if down != encoding else None,
            )

    def _adapters(self, case: Case) -> ktjax.LoRA:
        if case.rank not in self._lora:
            arrays = cases.lora(case.shape, case.rank)
            self._lora[case.rank] = ktjax.LoRA(
                **{name: jnp.asarray(array) for name, array in arrays.items()}
            )
        return self._lora[case.rank]

    def peaks(self, seconds: float) -> dict[str, Any]:
        """What the machine can do at best, each figure measured for `seconds`."""
        return _native.measure_peaks(seconds)

    def facts(self) -> dict[str, Any]:
        """The machine, the kernels in use, and versions."""
        config = self.pool.config
        return {
            **backend.describe(),
            "isa": self.pool.isa,
            "pool_threads": config.threads_per_subpool * config.subpool_count,
            "ktjax": ktjax.__version__,
            "jax": jax.__version__,
        }

    def profile(self) -> dict[str, tuple[float, int]]:
        """Seconds and calls of each phase since the last time."""
        return backend.take_profile()

    def workspace_bytes(self) -> int:
        """Scratch that the pool keeps between calls."""
        return _native.workspace_bytes()


def _forward(options, store, lora, x, ids, w):
    return ktjax.moe(x, ids, w, store, lora, scaling=cases.SCALING, **options)


def _eager(case: Case, store: ktjax.ExpertStore) -> Prepared:
    """As `KTMoEWrapper.forward` has it: inputs staged, and computed by the queue."""

    def call(x: np.ndarray, ids: np.ndarray, w: np.ndarray) -> jax.Array:
        pending = PendingSum(
            *(store, x, ids, w), chunk=CHUNK, dtype=x.dtype, compute=case.compute
        )
        return jax.block_until_ready(jnp.asarray(pending.result()))

    calls = [functools.partial(call, *batch[:3]) for batch in cases.batches(case)]
    return Prepared(calls, _named, _result_bytes)


def _train(options, store, lora, x, ids, w, grad_y):
    y, pullback = jax.vjp(
        lambda x, w, lora: _forward(options, store, lora, x, ids, w), x, w, lora
    )
    return y, pullback(grad_y)


def _result_bytes(result: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def _named(result: Any) -> dict[str, np.ndarray]:
    if not isinstance(result, tuple):
        return {"y": np.asarray(result, np.float32)}
    y, (grad_x, grad_w, grad_lora) = result
    arrays = {"y": y, "x": grad_x, "w": grad_w}
    arrays |= dict(zip(ktjax.LoRA.NAMES, grad_lora.arrays(), strict=True))
    return {name: np.asarray(array, np.float32) for name, array in arrays.items()}
