"""The kernels' speed on this machine, on one layer of random weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import ktjax
from ktjax import _native, backend
from ktjax.commands.config import BenchConfig
from ktjax.models import ModelConfig
from ktjax.store import ExpertStore
from ktjax.train.plan import available_memory
from ktjax.train.plan_program import random_store

# Calls before time counts: the first compiles, the second finds untouched memory.
_WARM = 2
# A measurement of the machine's peaks between two rounds.
_PEAK_SECONDS = 0.1
_ROUNDS = 5
_SCALING = 2.0


@dataclasses.dataclass(frozen=True)
class _Layer:
    """Sizes of the layer that is measured."""

    experts: int
    per_token: int
    hidden: int
    width: int

    def flops(self, tokens: int) -> int:
        """Of the base products of a forward."""
        return 6 * tokens * self.per_token * self.hidden * self.width

    def touched(self, tokens: int) -> int:
        """Experts that `tokens` tokens choose, as `_routes` has it."""
        return min(self.experts, tokens * self.per_token)


# What is measured without a model: Qwen3-30B-A3B.
_DEFAULT = _Layer(128, 8, 2048, 768)


def run_bench(config: BenchConfig, console: Console) -> None:
    """Measure forward, forward with LoRA and train step, and show them as a table.

    Raises:
      ConfigError, FileNotFoundError: the model cannot be read.
      ValueError: the layer does not fit in memory; names a number of experts that does.
    """
    layer = _layer_of(config)
    _check_memory(layer, config.lora_rank)
    lora = _adapters(layer, config.lora_rank)
    sizes = layer.experts, layer.hidden, layer.width
    with random_store(config.encoding, *sizes) as store:
        cases = [
            (tokens, name, _prepare(store, layer, tokens, lora, name))
            for tokens in config.token_counts
            for name in ("forward", "LoRA", "train")
        ]
        times: list[list[float]] = [[] for _ in cases]
        peaks: list[dict[str, float]] = []
        for _ in track(range(_ROUNDS), "measuring", console=console, transient=True):
            peaks.append(_native.measure_peaks(_PEAK_SECONDS))
            for (_, _, calls), seconds in zip(cases, times, strict=True):
                seconds.extend(_timed(calls, config.seconds / _ROUNDS))
        nbytes = store.nbytes
    peak = {key: statistics.median(p[key] for p in peaks) for key in peaks[0]}
    console.print(_header(config, layer), highlight=False, soft_wrap=True)
    table = Table(
        "tokens", "pass", "ms", "tokens/s", "GF/s", "% peak", "GB/s", "% memory"
    )
    for (tokens, name, _), seconds in zip(cases, times, strict=True):
        median = statistics.median(seconds)
        twice = 2 if name == "train" else 1
        rate = twice * layer.flops(tokens) / median / 1e9
        share = layer.touched(tokens) / layer.experts
        read = twice * nbytes * share / median / 1e9
        table.add_row(
            f"{tokens:,}",
            name,
            f"{1e3 * median:.2f}",
            f"{tokens / median:,.0f}",
            f"{rate:.0f}",
            f"{100 * rate / peak['bf16_gflops']:.0f}",
            f"{read:.1f}",
            f"{100 * read / peak['dram_read_gbs']:.0f}",
        )
    console.print(table)
    console.print(
        f"peaks in the same minutes: {peak['bf16_gflops']:.0f} GF/s in bfloat16, "
        f"{peak['dram_read_gbs']:.1f} GB/s read from memory\n"
        "base products and base weights alone are counted; medians",
        highlight=False,
        soft_wrap=True,
    )


def _layer_of(config: BenchConfig) -> _Layer:
    layer = _DEFAULT
    if config.model is not None:
        model = ModelConfig.from_pretrained(config.model)
        layer = _Layer(
            model.num_experts,
            model.num_experts_per_tok,
            model.hidden_size,
            model.moe_intermediate_size,
        )
    experts = config.num_experts or layer.experts
    if not layer.per_token <= experts <= layer.experts:
        raise ValueError(
            f"BenchConfig.num_experts must be {layer.per_token}, the experts of a "
            f"token, to {layer.experts}, got {experts}"
        )
    return dataclasses.replace(layer, experts=experts)


def _check_memory(layer: _Layer, rank: int) -> None:
    """Weights in bfloat16, the store made of them, adapters and gradients must fit."""
    expert = 2 * 2 * 3 * layer.hidden * layer.width
    expert += 2 * 4 * 3 * rank * (layer.hidden + layer.width)
    fits = int(0.8 * available_memory()) // expert
    if fits < layer.experts:
        raise ValueError(
            f"a layer of {layer.experts} experts takes "
            f"{layer.experts * expert / 1e9:.1f} GB to measure, more than there is; "
            f"give --num-experts, at most {fits}"
        )


def _routes(layer: _Layer, tokens: int, call: int) -> np.ndarray[Any, Any]:
    """Every expert as often; few tokens take other experts in each call."""
    slots = np.arange(tokens * layer.per_token) + call * tokens * layer.per_token
    return (slots % layer.experts).reshape(tokens, layer.per_token).astype(np.int32)


def _adapters(layer: _Layer, rank: int) -> ktjax.LoRA:
    random = np.random.default_rng(1)
    shapes = ktjax.LoRA.shapes(layer.experts, layer.hidden, layer.width, rank)
    arrays = (random.standard_normal(s, np.float32) / s[-1] for s in shapes.values())
    return ktjax.LoRA(*map(jnp.asarray, arrays))


def _prepare(
    store: ExpertStore, layer: _Layer, tokens: int, adapters: ktjax.LoRA, name: str
) -> Iterator[Callable[[], Any]]:
    """Calls to time, for ever; those that warm up are done."""
    random = np.random.default_rng(0)
    x, grad_y = (
        jnp.asarray(random.standard_normal((tokens, layer.hidden)), jnp.bfloat16)
        for _ in range(2)
    )
    w = jnp.full((tokens, layer.per_token), 1 / layer.per_token)
    lora = None if name == "forward" else adapters

    def forward(x: Any, w: Any, lora: Any, ids: Any, store: Any) -> Any:
        return ktjax.moe(x, ids, w, store, lora, scaling=_SCALING)

    def train(x: Any, w: Any, lora: Any, ids: Any, store: Any) -> Any:
        y, pullback = jax.vjp(
            lambda x, w, lora: forward(x, w, lora, ids, store), x, w, lora
        )
        return y, pullback(grad_y)

    run = jax.jit(train if name == "train" else forward)
    # As many batches as it takes to come to every expert.
    batches = max(1, layer.experts // (tokens * layer.per_token))
    routes = [jnp.asarray(_routes(layer, tokens, i)) for i in range(batches)]
    calls = itertools.cycle(
        functools.partial(run, x, w, lora, ids, store) for ids in routes
    )
    for _ in range(_WARM):
        jax.block_until_ready(next(calls)())
    return calls


def _timed(calls: Iterator[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of calls that take about `seconds`, two at least."""
    found: list[float] = []
    while len(found) < 2 or sum(found) < seconds:
        call = next(calls)
        began = time.perf_counter()
        jax.block_until_ready(call())
        found.append(time.perf_counter() - began)
    return found


def _header(config: BenchConfig, layer: _Layer) -> str:
    facts = backend.describe()
    pool = backend.get_pool()
    threads = pool.config.threads_per_subpool * pool.config.subpool_count
    return (
        f"machine {facts['cpu']}, {threads} threads, {pool.isa} kernels\n"
        f"layer   {layer.experts} experts, {layer.per_token} per token, hidden "
        f"{layer.hidden}, width {layer.width}; {config.experts}, rank "
        f"{config.lora_rank}"
    )
