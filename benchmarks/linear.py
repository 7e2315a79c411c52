"""`python -m benchmarks.linear`: frozen projections, ktjax.linear against XLA:CPU.

In one process, a call of each contender in turn and round after round, each by itself:
whoever's threads still spin are given time to park.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import ktjax
from benchmarks.measure import PEAK_SECONDS, SETTLE_SECONDS
from ktjax import _native
from ktjax.nn.dense import matmul

Array = Any
PASSES = ("forward", "train")
BASELINE = "ktjax bf16"


@dataclasses.dataclass(frozen=True)
class Projection:
    """The sizes of a matrix [out, in]."""

    inputs: int
    outputs: int

    @classmethod
    def parse(cls, text: str) -> Projection:
        """From "INxOUT"."""
        inputs, outputs = map(int, text.split("x"))
        return cls(inputs, outputs)

    def flops(self, tokens: int, pass_name: str) -> int:
        """Of the base products: y, and in a train step the gradient of x."""
        return 2 * tokens * self.inputs * self.outputs * (1 + (pass_name == "train"))


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table, and of the JSON file; see `measure.Row`."""

    inputs: int
    outputs: int
    tokens: int
    pass_name: str
    contender: str
    calls: int
    median_ms: float
    gflops: float
    bf16_peak_share: float
    ratio: float


def _weight(projection: Projection) -> np.ndarray[Any, Any]:
    rng = np.random.default_rng(0)
    shape = (projection.outputs, projection.inputs)
    weight = rng.standard_normal(shape, np.float32)
    weight *= projection.inputs**-0.5
    return weight


def _contenders(
    projection: Projection, formats: Sequence[str]
) -> Iterator[tuple[str, Any, Any, Callable[[Array, Any], Array]]]:
    """Name, dtype of x, operand and product of each."""
    weight = _weight(projection)
    for name in ("bf16", *formats):
        store = ktjax.LinearStore.from_array(weight, format=name)
        yield f"ktjax {name}", jnp.bfloat16, store, ktjax.linear
        if name == "bf16":
            yield "ktjax bf16, float32 x", jnp.float32, store, ktjax.linear
    transposed = jnp.asarray(np.ascontiguousarray(weight.T))
    yield "XLA:CPU float32", jnp.float32, transposed, jnp.matmul
    # Says float32 accumulation, which XLA:CPU has fast bfloat16 kernels for.
    yield "XLA:CPU bfloat16", jnp.bfloat16, transposed.astype(jnp.bfloat16), matmul


def measure(
    projection: Projection,
    tokens: Sequence[int],
    rounds: int,
    formats: Sequence[str],
    report: Callable[[str], None],
) -> list[Row]:
    """Times every pass of every contender in turns."""
    rows = []
    contenders = list(_contenders(projection, formats))
    for count in tokens:
        for pass_name in PASSES:
            calls = {}
            for name, dtype, operand, product in contenders:
                report(f"{projection}, {count} tokens, {pass_name}: compiling {name}")
                calls[name] = _call(
                    projection, count, pass_name, dtype, operand, product
                )
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            peaks = []
            for turn in range(rounds):
                report(f"{projection}, {count} tokens, {pass_name}: round {turn + 1}")
                time.sleep(SETTLE_SECONDS)
                peaks.append(_native.measure_peaks(PEAK_SECONDS)["bf16_gflops"])
                names = list(calls)
                shift = turn % len(names)
                for name in names[shift:] + names[:shift]:
                    time.sleep(SETTLE_SECONDS)
                    start = time.perf_counter()
                    jax.block_until_ready(calls[name]())
                    seconds[name].append(time.perf_counter() - start)
            peak = statistics.median(peaks)
            for name, times in seconds.items():
                median = statistics.median(times)
                gflops = projection.flops(count, pass_name) / median / 1e9
                pairs = zip(times, seconds[BASELINE], strict=True)
                rows.append(
                    Row(
                        inputs=projection.inputs,
                        outputs=projection.outputs,
                        tokens=count,
                        pass_name=pass_name,
                        contender=name,
                        calls=len(times),
                        median_ms=1e3 * median,
                        gflops=gflops,
                        bf16_peak_share=gflops / peak,
                        ratio=statistics.median(a / b for a, b in pairs),
                    )
                )
            calls.clear()
            gc.collect()
    return rows


def _call(
    projection: Projection,
    tokens: int,
    pass_name: str,
    dtype: Any,
    operand: Any,
    product: Callable[[Array, Any], Array],
) -> Callable[[], Any]:
    """A compiled call that has run once."""
    rng = np.random.default_rng(1)

    def values(width: int) -> Array:
        # Repeated rows: drawing 311 million numbers would take longer than the call.
        some = rng.standard_normal((min(tokens, 32), width), np.float32)
        return jnp.asarray(np.resize(some, (tokens, width)), dtype)

    def forward(operand: Any, x: Array) -> Array:
        return product(x, operand)

    def train(operand: Any, x: Array, grad_y: Array) -> tuple[Array, Array]:
        y, pullback = jax.vjp(lambda x: product(x, operand), x)
        return y, pullback(grad_y)[0]

    arguments = (operand, values(projection.inputs))
    function: Callable[..., Any] = forward
    if pass_name == "train":
        function, arguments = train, (*arguments, values(projection.outputs))
    compiled = jax.jit(function).lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    return lambda: compiled(*arguments)


def print_rows(console: Console, rows: Sequence[Row]) -> None:
    """Milliseconds and what they mean; the last column is time over ktjax's."""
    table = Table(title="projections", caption=f"ratio: time over that of {BASELINE}")
    for name in ("in x out", "tokens", "pass", "contender"):
        table.add_column(name)
    for name in ("ms", "GF/s", "% of BF16 peak", "ratio"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.inputs} x {row.outputs}",
            str(row.tokens),
            row.pass_name,
            row.contender,
            f"{row.median_ms:.2f}",
            f"{row.gflops:.0f}",
            f"{100 * row.bf16_peak_share:.0f}%",
            f"{row.ratio:.2f}",
        )
    console.print(table)


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.linear", description=__doc__
    )
    parser.add_argument("--sizes", default="2048x4096,2048x151936", help="INxOUT,...")
    parser.add_argument("--tokens", default="32,512,2048")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--formats", default="", help="stores beside bf16: int8,int4")
    parser.add_argument("--json", type=pathlib.Path, help="write the rows here")
    options = parser.parse_args(arguments)
    console = Console()
    notes = Console(stderr=True)
    rows: list[Row] = []
    for text in options.sizes.split(","):
        rows += measure(
            Projection.parse(text),
            [int(count) for count in options.tokens.split(",")],
            options.rounds,
            [name for name in options.formats.split(",") if name],
            lambda message: notes.print(message, style="dim"),
        )
    print_rows(console, rows)
    if options.json:
        content = [dataclasses.asdict(row) for row in rows]
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
