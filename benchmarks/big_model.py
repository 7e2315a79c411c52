"""`python -m benchmarks.big_model DIR`: a plan, then what happens; see README.md.

The plan and the training run in fresh processes, one after the other. The training is
the loop of `ktjax train`, checkpoint included, on the demo's chats.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import shapes

GB = 1e9
# Between looks at the memory of the process that trains.
_LOOK = 0.1
# Steps that do not count: the first compiles, the second finds untouched memory.
_WARM = 2

_NAMES = {
    "stores": "experts, frozen",
    "dense": "everything else, frozen",
    "adapters": "adapters",
    "optimizer": "AdamW's moments",
    "gradients": "gradients",
    "rest": "activations, logits, workspace, Python, JAX, XLA",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.big_model",
        description="What ktjax plan says of a training, beside what then happens.",
    )
    parser.add_argument("model", type=Path, help="see scripts/make_big_checkpoint.py")
    parser.add_argument("--experts", default="rawint4", help="default %(default)s")
    parser.add_argument("--dense", help="storage format of projections and head")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--lora-rank", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument(
        "--activation-policy", default="save", choices=("save", "recompute")
    )
    parser.add_argument("--remat", action="store_true")
    parser.add_argument(
        "--moment-dtype", default="float32", choices=("float32", "bfloat16")
    )
    parser.add_argument("--steps", type=int, default=6, help="default %(default)s")
    parser.add_argument(
        "--limit",
        type=float,
        help="end the training when it has more GB than this "
        "(default: 1 GB less than is available)",
    )
    parser.add_argument("--no-plan", action="store_true", help="train only")
    parser.add_argument("--json", type=Path, help="write what was found here")
    parser.add_argument("--child", choices=("plan", "train"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def make_config(options: argparse.Namespace, output_dir: Path | None = None) -> Any:
    """The training."""
    from ktjax import assets
    from ktjax.train import TrainConfig

    return TrainConfig(
        model=options.model,
        train_data=assets.demo_data("train"),
        output_dir=output_dir,
        experts=options.experts,
        dense=options.dense,
        dtype=options.dtype,
        lora_rank=options.lora_rank,
        batch_size=options.batch_size,
        sequence_length=options.sequence_length,
        activation_policy=options.activation_policy,
        remat=options.remat,
        moment_dtype=options.moment_dtype,
        steps=options.steps,
        warmup_steps=0,
    )


def run_plan(options: argparse.Namespace) -> dict[str, Any]:
    """What `ktjax plan` finds, and in how many seconds."""
    from ktjax.models import ModelConfig
    from ktjax.train import plan

    model, config = ModelConfig.from_pretrained(options.model), make_config(options)
    began = time.perf_counter()
    planned = plan.plan_memory(model, config)
    compiled = time.perf_counter()
    timing, workspace = plan.measure_time(model, config, plan.available_memory())
    measured = time.perf_counter()
    largest = planned.largest(plan.available_memory() - workspace)
    parts = dataclasses.asdict(planned.memory())
    parts["rest"] = parts.pop("step") + parts.pop("process") + workspace
    return {
        "parts": parts,
        "total": sum(parts.values()),
        "step_seconds": timing.step,
        "timing": dataclasses.asdict(timing),
        "largest": dataclasses.asdict(largest),
        "seconds": {
            "memory": compiled - began,
            "time": measured - compiled,
            "largest": time.perf_counter() - measured,
        },
    }


class _Times:
    """A `ktjax.train.loop.Observer` that keeps the seconds of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def on_step(self, metrics: dict[str, float]) -> None:
        self.seconds.append(metrics["seconds"])
        self.losses.append(metrics["loss"])
        print(
            f"step {len(self.seconds)}: {metrics['seconds']:.2f} s, loss "
            f"{metrics['loss']:.3f}",
            file=sys.stderr,
            flush=True,
        )

    def on_evaluation(self, step: int, loss: float) -> None:
        pass

    def on_checkpoint(self, path: Path) -> None:
        pass


def run_train(options: argparse.Namespace) -> dict[str, Any]:
    """Load and train; memory by part, seconds of loading and of steps."""
    import jax
    from flax import nnx

    from ktjax.models import Tokenizer, from_pretrained
    from ktjax.nn import FrozenLinear
    from ktjax.train import fit, read_chats, tokenize
    from ktjax.train.plan_program import tree_bytes
    from ktjax.train.run import random_streams

    with tempfile.TemporaryDirectory() as directory:
        config = make_config(options, Path(directory))
        chats = read_chats(config.train_path)
        train = tokenize(chats, Tokenizer(config.model_path), config.sequence_length)
        began = time.perf_counter()
        model = from_pretrained(
            config.model_path,
            experts=config.experts,
            dense=config.dense,
            dtype=config.dtype,
            lora=config.lora,
            activation_policy=config.activation_policy,
            remat=config.remat,
            rngs=random_streams(config.seed),
        )
        loaded = time.perf_counter() - began
        print(f"loaded in {loaded:.1f} s", file=sys.stderr, flush=True)
        lora = nnx.state(model, nnx.LoRAParam)
        adapters = tree_bytes(lora)
        moments = adapters // 2 if config.moment_dtype == "bfloat16" else adapters
        stores = sum(layer.experts.store.nbytes for _, layer in model.moe_layers())
        arrays = tree_bytes(nnx.state(model)) - adapters
        linear = sum(
            part.store.nbytes
            for _, part in nnx.iter_graph(model)
            if isinstance(part, FrozenLinear)
        )
        count = sum(leaf.size for leaf in jax.tree.leaves(lora))
        del lora  # or it would be a second copy
        times = _Times()
        fit(model, train, [], config, Path(directory), times)
        model.close()
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    total = int(peak.split()[1]) * 1024
    parts = {
        "stores": stores,
        "dense": arrays + linear,
        "adapters": adapters,
        "optimizer": moments + adapters,
        "gradients": adapters,
    }
    parts["rest"] = total - sum(parts.values())
    steady = times.seconds[_WARM:] or times.seconds[-1:]
    return {
        "parts": parts,
        "total": total,
        "load_seconds": loaded,
        "step_seconds": min(steady),
        "all_step_seconds": times.seconds,
        "losses": times.losses,
        "trained": count,
    }


def run_child(
    kind: str, arguments: Sequence[str], limit: float | None = None
) -> dict[str, Any]:
    """`run_plan` or `run_train` in a process of its own.

    Raises:
      SystemExit: it failed, or had more than `limit` bytes.
    """
    command = [sys.executable, "-m", "benchmarks.big_model", *arguments]
    process = subprocess.Popen([*command, "--child", kind], stdout=subprocess.PIPE)
    watch = threading.Thread(target=_watch, args=(process, limit), daemon=True)
    watch.start()
    out, _ = process.communicate()
    if process.returncode:
        sys.exit(f"error: {kind} ended with {process.returncode}")
    return json.loads(out.decode().splitlines()[-1])


def _watch(process: subprocess.Popen[bytes], limit: float | None) -> None:
    """Ends a process that takes more memory than it may: the machine needs some too."""
    while limit is not None and process.poll() is None:
        try:
            pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
        except (OSError, IndexError):
            return
        if pages * 4096 > limit:
            print(
                f"the training has {pages * 4096 / GB:.1f} GB, more than "
                f"{limit / GB:.1f} GB: ended",
                file=sys.stderr,
            )
            process.kill()
            return
        time.sleep(_LOOK)


def table(planned: dict[str, Any] | None, found: dict[str, Any]) -> Table:
    """Planned beside measured."""
    shown = Table(box=None, pad_edge=False)
    for name in ("", "planned", "measured", "planned / measured"):
        shown.add_column(name, justify="left" if not name else "right")

    def row(name: str, plan: float | None, real: float, unit: str) -> None:
        told = "" if plan is None else f"{plan:.2f} {unit}"
        ratio = "" if not plan or not real else f"{plan / real:.3f}"
        shown.add_row(name, told, f"{real:.2f} {unit}", ratio)

    for part, name in _NAMES.items():
        plan = None if planned is None else planned["parts"][part] / GB
        row(name, plan, found["parts"][part] / GB, "GB")
    for name, key, scale, unit in (
        ("resident at the peak", "total", GB, "GB"),
        ("a step", "step_seconds", 1, "s"),
    ):
        plan = None if planned is None else planned[key] / scale
        row(name, plan, found[key] / scale, unit)
    row("loading", None, found["load_seconds"], "s")
    return shown


def main(arguments: Sequence[str] | None = None) -> None:
    """Plans, trains, and prints both."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = parse(given)
    if options.child:
        run = run_plan if options.child == "plan" else run_train
        print(json.dumps(run(options)))
        return
    console = Console(width=None if sys.stdout.isatty() else 120)
    planned = None
    if not options.no_plan:
        planned = run_child("plan", given)
        spent = planned["seconds"]
        console.print(
            f"plan: {spent['memory']:.1f} s for memory, {spent['time']:.1f} s for "
            f"time, {spent['largest']:.2f} s for the largest: {planned['largest']}",
            highlight=False,
        )
    limit = options.limit * GB if options.limit else shapes.available_memory() - GB
    found = run_child("train", given, limit)
    console.print(table(planned, found), highlight=False)
    console.print(
        "steps: " + ", ".join(f"{s:.2f}" for s in found["all_step_seconds"]) + " s; "
        "loss: " + ", ".join(f"{loss:.3f}" for loss in found["losses"]),
        highlight=False,
    )
    if options.json:
        both = {"command": given, "planned": planned, "measured": found}
        options.json.write_text(json.dumps(both, indent=2) + "\n")


if __name__ == "__main__":
    main()
