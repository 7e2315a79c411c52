"""XLA:CPU: the best plain-JAX formulations of a mixture of experts.

All in float32, activations included: XLA:CPU's bfloat16 products are several times
slower. Weights lie as `[E, in, out]`, the layout its products like best.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cases
from benchmarks.cases import LORA_NAMES, SCALING, Case
from benchmarks.contenders import Contender, Prepared
from benchmarks.shapes import Shape

Array = Any
# Per-expert weights by name; a product of rows with the weights of that name.
Parameters = dict[str, Array]
Product = Callable[[Array, str], Array]


class Xla(Contender):
    """Four formulations: gather, padded, scan, ragged."""

    def __init__(self) -> None:
        self._base: Parameters = {}
        self._lora: dict[int, Parameters] = {}

    def load(self, shape: Shape) -> None:
        self.close()
        for name, array in cases.weights(shape):
            transposed = np.empty(
                (array.shape[0], array.shape[2], array.shape[1]), np.float32
            )
            for expert, matrix in enumerate(array):
                transposed[expert] = matrix.T
            self._base[name] = jax.block_until_ready(jnp.asarray(transposed))

    def prepare(self, case: Case) -> Prepared:
        batches = cases.batches(case)
        experts, k = case.shape.experts, case.shape.k
        largest = max(int(np.bincount(b.ids.ravel()).max()) for b in batches)
        # The exact size of the largest group: a real program would have to guess.
        capacity = -(-largest // 8) * 8
        formulations: dict[str, Callable[..., Array]] = {
            "gather f32": _gather,
            "padded f32": functools.partial(_padded, capacity),
            "scan f32": functools.partial(_scan, capacity),
            "ragged f32": _ragged,
        }
        if case.variant not in formulations:
            raise ValueError(
                f"xla: variant: expected one of {sorted(formulations)}, got "
                f"{case.variant!r}"
            )
        if not self._base or self._base["gate"].shape[0] != experts:
            raise RuntimeError(f"prepare: call load with {case.shape} first")
        moe = formulations[case.variant]
        function = _train if case.pass_name == "train" else _forward
        lora = self._adapters(case) if case.adapted else {}
        arguments = []
        for batch in batches:
            x, grad_y = (
                jnp.asarray(array, jnp.float32) for array in (batch.x, batch.grad_y)
            )
            extra = (grad_y,) if case.pass_name == "train" else ()
            arguments.append((self._base, lora, x, batch.ids, batch.w, *extra))
        arguments = [jax.tree.map(jnp.asarray, each) for each in arguments]
        assert arguments[0][3].shape == (case.tokens, k)
        jax.block_until_ready(arguments)
        jitted = jax.jit(functools.partial(function, moe))
        compiled = jitted.lower(*arguments[0]).compile()

        def call(arguments: tuple[Any, ...]) -> Callable[[], Any]:
            return lambda: jax.block_until_ready(compiled(*arguments))

        return Prepared([call(each) for each in arguments], _named, _result_bytes)

    def close(self) -> None:
        self._base.clear()
        self._lora.clear()

    def _adapters(self, case: Case) -> Parameters:
        if case.rank not in self._lora:
            self._lora[case.rank] = {
                name: jnp.asarray(array.transpose(0, 2, 1))
                for name, array in cases.lora(case.shape, case.rank).items()
            }
        return self._lora[case.rank]


def _forward(moe, base, lora, x, ids, w):
    return moe({**base, **lora}, x, ids, w)


def _train(moe, base, lora, x, ids, w, grad_y):
    y, pullback = jax.vjp(
        lambda x, w, lora: moe({**base, **lora}, x, ids, w), x, w, lora
    )
    return y, pullback(grad_y)


def _expert(rows: Array, product: Product, adapted: bool) -> Array:
    """SwiGLU on rows in expert order."""

    def project(rows: Array, name: str) -> Array:
        out = product(rows, name)
        if adapted:
            low = product(rows, f"{name}_a")
            out = out + SCALING * product(low, f"{name}_b")
        return out

    return project(jax.nn.silu(project(rows, "gate")) * project(rows, "up"), "down")


def _sort(ids: Array, experts: int) -> tuple[Array, Array, Array]:
    """Slots in expert order, their experts, and where each expert begins."""
    flat = ids.reshape(-1)
    order = jnp.argsort(flat)
    sorted_ids = flat[order]
    return order, sorted_ids, jnp.searchsorted(sorted_ids, jnp.arange(experts))


def _combine(rows: Array, order: Array, w: Array) -> Array:
    """Rows in expert order back to tokens, weighted."""
    slots = jnp.zeros_like(rows).at[order].set(rows).reshape(*w.shape, -1)
    return jnp.einsum("tkh,tk->th", slots, w)


def _padded(capacity: int, p: Parameters, x: Array, ids: Array, w: Array) -> Array:
    """Groups padded to the largest, batched products."""
    experts, k = p["down"].shape[0], ids.shape[1]
    order, sorted_ids, start = _sort(ids, experts)
    slot = sorted_ids * capacity + jnp.arange(ids.size) - start[sorted_ids]
    padded = jnp.zeros((experts * capacity, x.shape[1]), x.dtype)
    padded = padded.at[slot].set(x[order // k]).reshape(experts, capacity, -1)
    y = _expert(
        padded, lambda a, name: jnp.einsum("eci,eio->eco", a, p[name]), "gate_a" in p
    )
    return _combine(y.reshape(experts * capacity, -1)[slot], order, w)


def _scan(capacity: int, p: Parameters, x: Array, ids: Array, w: Array) -> Array:
    """One expert after another, each on a padded slice of the sorted rows."""
    experts, k = p["down"].shape[0], ids.shape[1]
    order, sorted_ids, start = _sort(ids, experts)
    rows = jnp.concatenate([x[order // k], jnp.zeros((capacity, x.shape[1]))])

    def body(carry: None, expert: tuple[Array, Parameters]) -> tuple[None, Array]:
        begin, q = expert
        group = jax.lax.dynamic_slice_in_dim(rows, begin, capacity)
        return carry, _expert(group, lambda a, name: a @ q[name], "gate_a" in p)

    _, y = jax.lax.scan(body, None, (start, p))
    slot = sorted_ids * capacity + jnp.arange(ids.size) - start[sorted_ids]
    return _combine(y.reshape(experts * capacity, -1)[slot], order, w)


def _ragged(p: Parameters, x: Array, ids: Array, w: Array) -> Array:
    """`lax.ragged_dot`; on the CPU its cost grows with the number of experts."""
    experts, k = p["down"].shape[0], ids.shape[1]
    order, _, _ = _sort(ids, experts)
    sizes = jnp.bincount(ids.reshape(-1), length=experts).astype(jnp.int32)
    y = _expert(
        x[order // k],
        lambda a, name: jax.lax.ragged_dot(a, p[name], sizes),
        "gate_a" in p,
    )
    return _combine(y, order, w)


def _gather(p: Parameters, x: Array, ids: Array, w: Array) -> Array:
    """A copy of the chosen weights for every slot: for very few tokens."""
    chosen = {name: array[ids.reshape(-1)] for name, array in p.items()}
    rows = jnp.repeat(x, ids.shape[1], axis=0)[:, None]
    y = _expert(
        rows, lambda a, name: jnp.einsum("sci,sio->sco", a, chosen[name]), "gate_a" in p
    )
    return jnp.einsum("tkh,tk->th", y.reshape(*w.shape, -1), w)


def _result_bytes(result: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(result))


def _named(result: Any) -> dict[str, np.ndarray]:
    if not isinstance(result, tuple):
        return {"y": np.asarray(result)}
    y, (grad_x, grad_w, grad_lora) = result
    arrays = {"y": y, "x": grad_x, "w": grad_w}
    arrays |= {name: grad_lora[name].transpose(0, 2, 1) for name in LORA_NAMES}
    return {name: np.asarray(array) for name, array in arrays.items()}
