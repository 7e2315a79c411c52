"""torch: eager formulations of a mixture of experts, in bfloat16.

Adapters are bfloat16 too, so nothing is cast in a call.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import cases
from benchmarks.cases import LORA_NAMES, SCALING, Case
from benchmarks.contenders import Contender, Prepared
from benchmarks.shapes import Shape

Tensor = torch.Tensor
Parameters = dict[str, Tensor]


class Torch(Contender):
    """Three formulations: the loop of Hugging Face models, sorted, grouped."""

    def __init__(self, threads: int | None = None):
        if threads:
            torch.set_num_threads(threads)
        self._base: Parameters = {}
        self._lora: dict[int, Parameters] = {}

    def load(self, shape: Shape) -> None:
        self.close()
        arrays = {name: _tensor(array) for name, array in cases.weights(shape)}
        self._base["gate_up"] = torch.cat([arrays.pop("gate"), arrays.pop("up")], 1)
        # Into memory of torch's own, which is aligned to cache lines.
        self._base["down"] = arrays["down"].clone()

    def prepare(self, case: Case) -> Prepared:
        formulations = {"loop": _loop, "sorted": _sorted, "grouped": _grouped}
        if case.variant not in formulations:
            raise ValueError(
                f"torch: variant: expected one of {sorted(formulations)}, got "
                f"{case.variant!r}"
            )
        if not self._base or self._base["down"].shape[0] != case.shape.experts:
            raise RuntimeError(f"prepare: call load with {case.shape} first")
        moe = formulations[case.variant]
        base = self._base
        lora = self._adapters(case) if case.adapted else {}

        def call(batch: cases.Batch) -> Any:
            x, grad_y = _tensor(batch.x), _tensor(batch.grad_y)
            ids, w = torch.from_numpy(batch.ids).long(), torch.from_numpy(batch.w)

            def forward() -> tuple[Tensor, ...]:
                with torch.no_grad():
                    return (moe({**base, **lora}, x, ids, w),)

            def train() -> tuple[Tensor, ...]:
                adapters = {n: a.detach().requires_grad_() for n, a in lora.items()}
                leaves = [x.detach().requires_grad_(), w.detach().requires_grad_()]
                y = moe({**base, **adapters}, leaves[0], ids, leaves[1])
                wrt = leaves + [adapters[name] for name in LORA_NAMES]
                return (y.detach(), *torch.autograd.grad(y, wrt, grad_y))

            return train if case.pass_name == "train" else forward

        calls = [call(batch) for batch in cases.batches(case)]
        return Prepared(calls, _named, lambda result: sum(t.nbytes for t in result))

    def close(self) -> None:
        self._base.clear()
        self._lora.clear()

    def _adapters(self, case: Case) -> Parameters:
        if case.rank not in self._lora:
            self._lora[case.rank] = {
                name: torch.from_numpy(array).bfloat16()
                for name, array in cases.lora(case.shape, case.rank).items()
            }
        return self._lora[case.rank]


def _tensor(array: np.ndarray) -> Tensor:
    """A bfloat16 array of NumPy as a tensor on the same memory."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)


def _expert(rows: Tensor, p: Any, product: Any) -> Tensor:
    """SwiGLU with adapters where `p` has them; `product(rows, p[name])`."""
    gate, up = product(rows, p["gate_up"]).chunk(2, -1)
    if "gate_a" in p:
        gate = gate + SCALING * product(product(rows, p["gate_a"]), p["gate_b"])
        up = up + SCALING * product(product(rows, p["up_a"]), p["up_b"])
    hidden = F.silu(gate) * up
    out = product(hidden, p["down"])
    if "down_a" in p:
        out = out + SCALING * product(product(hidden, p["down_a"]), p["down_b"])
    return out


def _loop(p: Parameters, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Over the experts that were hit: take their tokens, compute, add them up."""
    mask = F.one_hot(ids, p["down"].shape[0]).permute(2, 1, 0)
    out = torch.zeros_like(x)
    for expert in (mask.sum((-1, -2)) > 0).nonzero()[:, 0].tolist():
        slot, token = torch.where(mask[expert])
        q = {name: array[expert] for name, array in p.items()}
        y = (_expert(x[token], q, F.linear) * w[token, slot, None]).to(out.dtype)
        if torch.is_grad_enabled():
            out = out.index_add(0, token, y)
        else:
            out.index_add_(0, token, y)
    return out


def _sorted(p: Parameters, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """Sorts the slots once and splits them. Its autograd avoids `_loop`'s zero tensor
    of the size of all adapters for every expert."""
    k = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=p["down"].shape[0]).tolist()
    groups = x[order // k].split(counts)
    unbound = {name: array.unbind(0) for name, array in p.items()}
    parts = []
    for expert, rows in enumerate(groups):
        if counts[expert]:
            q = {name: arrays[expert] for name, arrays in unbound.items()}
            parts.append(_expert(rows, q, F.linear))
    slots = torch.cat(parts)[_inverse(order)].view(*ids.shape, -1)
    return (slots * w[..., None]).sum(1).to(x.dtype)


def _grouped(p: Parameters, x: Tensor, ids: Tensor, w: Tensor) -> Tensor:
    """`grouped_mm` over the sorted slots."""
    k = ids.shape[1]
    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=p["down"].shape[0])
    ends = counts.cumsum(0).to(torch.int32)

    def product(rows: Tensor, weights: Tensor) -> Tensor:
        return F.grouped_mm(rows, weights.transpose(-2, -1), offs=ends)

    y = _expert(x[order // k], p, product) * w.reshape(-1)[order][:, None]
    return y[_inverse(order)].view(*ids.shape, -1).sum(1).to(x.dtype)


def _inverse(order: Tensor) -> Tensor:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel())
    return inverse


def _named(result: tuple[Tensor, ...]) -> dict[str, np.ndarray]:
    names = ("y", "x", "w", *LORA_NAMES)[: len(result)]
    return {
        name: array.float().numpy() for name, array in zip(names, result, strict=True)
    }
