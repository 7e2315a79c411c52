"""`python -m benchmarks.run`: see README.md beside this file."""

from __future__ import annotations

import argparse
import contextlib
import pathlib
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from benchmarks import cases, formats, report, shapes, studies
from benchmarks.report import Report
from benchmarks.shapes import SHAPES, Shape
from benchmarks.worker import Worker, WorkerError, installed

PEERS = ("xla", "torch", "ragged")


def _names(allowed: Sequence[str]):
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in allowed:
                raise argparse.ArgumentTypeError(
                    f"expected some of {','.join(allowed)}, got {name!r}"
                )
        return names

    return parse


def _formats(text: str) -> list[str]:
    try:
        names = [formats.canonical(name) for name in text.split(",") if name]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    # bfloat16 is what the others are compared with, and always there.
    return [name for name in dict.fromkeys(names) if name != "bf16"]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {value}")
    return value


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Speed of ktjax against this machine's limits and its peers.",
    )
    layers = "; ".join(f"{shape.name} = {shape.model}" for shape in SHAPES.values())
    parser.add_argument(
        "--shapes", type=_names(tuple(SHAPES)), default="S1,S2", help=layers
    )
    parser.add_argument(
        "--tokens",
        type=lambda text: [_positive(part) for part in text.split(",")],
        default="1,32,512,2048",
        help="1 is decoding, with other experts each call",
    )
    parser.add_argument(
        "--passes", type=_names(shapes.PASSES), default=",".join(shapes.PASSES)
    )
    parser.add_argument("--rank", type=_positive, default=16, help="of the adapters")
    parser.add_argument(
        "--peers",
        type=_names(PEERS),
        default="xla,torch",
        help="'' for none; ragged is lax.ragged_dot, which takes minutes on the CPU",
    )
    parser.add_argument("--routing", choices=cases.ROUTINGS, default="uniform")
    parser.add_argument(
        "--studies",
        type=_names(studies.STUDIES),
        default="table",
        help="table; skew: Zipf against uniform routing; lora: cost of adapters; "
        "formats: quantised weights against bfloat16; methods: every method of the "
        "inference wrapper; threads: 1 against all; "
        "memory: of a train step; profile: seconds by phase",
    )
    parser.add_argument(
        "--formats",
        type=_formats,
        default="int8,int4,int4_kgroup/128,int4_kgroup/32,fp8_block,rawint4,mxfp4,mxfp8",
        help="of the study of that name, default %(default)s: NAME, NAME/GROUP_SIZE, "
        "or NAME/GROUP_SIZE/z with zero points",
    )
    parser.add_argument(
        "--profile", action="store_true", help="short for adding profile to --studies"
    )
    parser.add_argument(
        "--experts", type=_positive, help="use at most this many experts of a layer"
    )
    parser.add_argument("--rounds", type=_positive, help="more is steadier")
    parser.add_argument("--json", type=pathlib.Path, help="write everything here")
    options = parser.parse_args(arguments)
    timed = studies.STORAGE_COMPUTES
    if "formats" in options.studies and not timed.keys() & set(options.passes):
        parser.error(
            f"--studies formats: expected some of {','.join(timed)} in --passes, got "
            f"{','.join(options.passes)!r}"
        )
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmarks and prints tables as they are ready."""
    options = parse(arguments)
    console = Console(width=None if sys.stdout.isatty() else 140)
    if options.profile and "profile" not in options.studies:
        options.studies.append("profile")
    families = ["xla"] if {"xla", "ragged"} & set(options.peers) else []
    if "torch" in options.peers:
        if installed("torch"):
            families.append("torch")
        else:
            console.print("torch is not installed and left out: `make interop` adds it")
    try:
        layers = [SHAPES[name].capped(options.experts) for name in options.shapes]
        for shape in layers:
            # The thread study holds a second store, after the peers' are gone.
            held = ["ktjax", *(families or ["ktjax"] * ("threads" in options.studies))]
            available = shapes.available_memory()
            shapes.check_memory(shape, held, options.rank, available)
            if "formats" in options.studies:
                # The peers' weights are gone by then.
                for name in options.formats:
                    formats.check_sizes(shape, name)
                _check_stores(shape, options.formats, options.rank, available)
            if "methods" in options.studies:
                held = [text for text, _ in _methods_that_fit(shape).values()]
                _check_stores(shape, held, options.rank, available)
    except (ValueError, MemoryError) as error:
        sys.exit(f"error: {error}")
    with contextlib.ExitStack() as stack, console.status("starting") as status:
        plan = studies.Plan(
            passes=options.passes,
            rank=options.rank,
            routing=options.routing,
            rounds=options.rounds,
            ragged="ragged" in options.peers,
            formats=options.formats,
            report=status.update,
        )
        ktjax = stack.enter_context(Worker("ktjax"))
        peers = [stack.enter_context(Worker(family)) for family in families]
        command = sys.argv[1:] if arguments is None else list(arguments)
        found = Report(ktjax.ask("facts"), command)
        report.print_machine(console, found.machine)
        for shape in layers:
            _run_shape(options, plan, shape, ktjax, peers, found, console)
            if options.json:
                found.write(options.json)


def _check_stores(shape: Shape, names: list[str], rank: int, available: int) -> None:
    stored = sum(formats.expert_bytes(shape, name) for name in set(names) - {"bf16"})
    shapes.check_memory(shape, ["ktjax"], rank, available, stored)


def _methods_that_fit(
    shape: Shape, tell: Callable[[str], None] = lambda message: None
) -> dict[str, tuple[str, str]]:
    """The inference methods whose groups divide the layer; tells of the others."""
    chosen = {}
    for name, method in studies.inference_methods().items():
        try:
            formats.check_sizes(shape, method[0])
            chosen[name] = method
        except ValueError as error:
            tell(f"{name} left out: {error}")
    return chosen


def _run_shape(
    options: argparse.Namespace,
    plan: studies.Plan,
    shape: Shape,
    ktjax: Worker,
    peers: list[Worker],
    found: Report,
    console: Console,
) -> None:
    wanted = options.studies

    def show(group: report.Group) -> None:
        found.groups.append(group)
        report.print_group(console, group)

    plan.report(f"{shape.name}: making weights")
    ktjax.load(shape)
    if "table" in wanted:
        for worker in peers:
            try:
                worker.load(shape)
            except WorkerError as error:
                console.print(f"{shape.name}: left out: {error}", highlight=False)
        for tokens in options.tokens:
            show(studies.table(plan, shape, tokens, ktjax, peers))
        for worker in peers:
            if worker.alive:
                worker.ask("unload")
    for tokens in options.tokens:
        if "skew" in wanted:
            show(studies.skew(plan, shape, tokens, ktjax))
        if "lora" in wanted:
            show(studies.lora(plan, shape, tokens, ktjax))
    if "formats" in wanted:
        plan.report(f"{shape.name}: quantising weights")
        ktjax.ask("hold", extra=options.formats)
        for tokens in options.tokens:
            show(studies.storage(plan, shape, tokens, ktjax))
        ktjax.ask("hold", extra=[])
    if "methods" in wanted:
        plan.report(f"{shape.name}: quantising weights")
        methods = _methods_that_fit(shape, console.print)
        held = {text for text, _ in methods.values()} - {"bf16"}
        ktjax.ask("hold", extra=sorted(held))
        for tokens in options.tokens:
            show(studies.methods(plan, shape, tokens, ktjax, methods))
        ktjax.ask("hold", extra=[])
    if "threads" in wanted:
        with Worker("ktjax", threads=1) as single:
            single.load(shape)
            for tokens in options.tokens:
                show(studies.threads(plan, shape, tokens, ktjax, single))
    ktjax.ask("unload")
    if "memory" in wanted:
        families = ["ktjax", *(worker.family for worker in peers)]
        rows = [
            row
            for tokens in options.tokens
            for row in studies.memory(plan, shape, tokens, families)
        ]
        found.memory += rows
        report.print_memory(console, rows)
    if "profile" in wanted:
        with Worker("ktjax", environment={"KTJAX_PROFILE": "1"}) as profiled:
            profiled.load(shape)
            for tokens in options.tokens:
                for profile in studies.profile(plan, shape, tokens, profiled):
                    found.profiles.append(profile)
                    report.print_profile(console, profile)


if __name__ == "__main__":
    main()
