"""What a training would need on this machine, before anything is loaded."""

from __future__ import annotations

import dataclasses

from rich.console import Console
from rich.table import Table

from ktjax import backend
from ktjax.commands.config import PlanConfig
from ktjax.models import ModelConfig
from ktjax.train import plan

GIB = 1 << 30

_NAMES = {
    "stores": "experts, frozen",
    "dense": "everything else, frozen",
    "adapters": "adapters",
    "optimizer": "AdamW's moments",
    "gradients": "gradients of the adapters",
    "step": "a step: activations, logits, workspace",
    "process": "Python, JAX, the compiled program",
}


def run_plan(config: PlanConfig, console: Console) -> None:
    """Show memory by part, whether it fits, what would fit, and seconds per step.

    Raises:
      ConfigError, FileNotFoundError, ValueError: the model cannot be planned; says why.
    """
    model = ModelConfig.from_pretrained(config.model)
    training = config.training()
    pool = backend.get_pool()
    available = plan.available_memory()
    budget = available if config.memory is None else round(config.memory * GIB)
    with console.status("compiling two and three layers"):
        planned = plan.plan_memory(model, training)
    memory = planned.memory()
    timing, failed = None, None
    if config.measure:
        try:
            with console.status("measuring a layer of random weights"):
                timing, workspace = plan.measure_time(model, training, available)
            memory = dataclasses.replace(memory, step=memory.step + workspace)
        except (ValueError, RuntimeError) as error:
            failed = error  # after the rest has been shown
    console.print(
        f"model   {config.model}\n"
        f"        {model.num_hidden_layers} layers, {model.num_experts} experts, "
        f"{model.num_experts_per_tok} per token; {config.experts}, rank "
        f"{config.lora_rank}, {config.batch_size} x {config.sequence_length} tokens",
        highlight=False,
        soft_wrap=True,
    )
    console.print(_memory_table(memory, pool.config.subpool_count), highlight=False)
    fits = memory.total <= budget
    verdict = "[green]fits[/]" if fits else "[bold red]does not fit[/]"
    console.print(
        f"        {verdict} into {budget / GIB:.1f} GiB"
        + (" that are available" if config.memory is None else ""),
        highlight=False,
    )
    if config.search:
        # What was measured is there in any case.
        largest = planned.largest(budget - (memory.total - planned.memory().total))
        console.print(
            f"largest rank {largest.rank}, or batch size {largest.batch_size}, or "
            f"sequence length {largest.sequence_length}, each with the others as above",
            highlight=False,
        )
    if timing is not None:
        tokens = config.batch_size * config.sequence_length
        part = (
            f" (from {timing.measured_experts} of {model.num_experts} experts)"
            if timing.measured_experts < model.num_experts
            else ""
        )
        console.print(
            f"step    {timing.step:.2f} s, {tokens / timing.step:,.0f} tokens/s: "
            f"{timing.layer:.3f} s a layer, {timing.rest:.3f} s the rest{part}",
            highlight=False,
        )
    if failed is not None:
        raise failed


def _memory_table(memory: plan.Memory, nodes: int) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column()
    for name, value in dataclasses.asdict(memory).items():
        said = "memory" if name == "stores" else ""
        table.add_row(said, f"{value / GIB:.2f} GiB", _NAMES[name])
    table.add_row("", f"{memory.total / GIB:.2f} GiB", "in all", style="bold")
    if nodes > 1:
        share = memory.stores / nodes / GIB
        table.add_row(
            "", f"{share:.2f} GiB", f"of the experts on each of {nodes} nodes"
        )
    return table
