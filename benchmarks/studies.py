"""What is compared with what: the main table and the questions beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

from benchmarks import cases, formats
from benchmarks.cases import Case
from benchmarks.measure import Entry, Group, interleave, key
from benchmarks.shapes import Shape
from benchmarks.worker import Worker
from ktjax import experts_inference

STUDIES = (
    *("table", "skew", "lora", "formats", "methods", "threads", "memory", "profile"),
)
LORA_RANKS = (16, 64)
# Of the study of formats: its passes, and the arithmetic that each is timed with.
STORAGE_COMPUTES = {"forward": ("bf16", "int8"), "train": ("bf16",)}
# Of the study of methods: what stands for the formats that LLAMAFILE finds in files.
GGUF_FORMATS = ("q4_k+q6_k", "q5_k", "q8_0", "iq4_xs", "q2_k")
# Calls of a pass that a profile is averaged over.
PROFILED_CALLS = 3
MEMORY_CALLS = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the user asked for.

    Attributes:
      passes: of `shapes.PASSES`, in order.
      rank: of the adapters.
      routing: of the main table.
      rounds: None for as many as the tokens suggest.
      ragged: whether XLA also runs `lax.ragged_dot`.
      formats: of the study of that name, beside "bf16".
      report: is told what goes on.
    """

    passes: Sequence[str]
    rank: int
    routing: str
    rounds: int | None
    ragged: bool
    formats: Sequence[str]
    report: Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class MemoryRow:
    """Memory of a train step above weights, adapters and inputs.

    Attributes:
      first_bytes: resident at the worst moment of the first call.
      peak_bytes: of `MEMORY_CALLS` calls. The difference is memory that was freed and
        that the process keeps, in the holes of malloc's arenas.
      result_bytes: of both, y and the gradients.
      scratch_bytes: of both, what ktjax keeps for the next call; None for peers.
    """

    shape: str
    tokens: int
    contender: str
    rank: int
    first_bytes: int
    peak_bytes: int
    result_bytes: int
    scratch_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Profile:
    """Where the time of a pass goes.

    Attributes:
      phase_ms: by phase, a call; what one worker thread sees, its waits included.
        Names with "in phases: " are kinds of work, which phases have in common.
      wall_ms: of a call, as its caller sees it.
    """

    shape: str
    tokens: int
    pass_name: str
    contender: str
    rank: int
    phase_ms: dict[str, float]
    wall_ms: float


def table(
    plan: Plan, shape: Shape, tokens: int, ktjax: Worker, peers: list[Worker]
) -> Group:
    """ktjax and every peer, all passes."""
    entries = []
    for pass_name in plan.passes:
        baseline = _case(plan, shape, tokens, pass_name, "ktjax", "save").label
        for worker in (ktjax, *peers):
            names = cases.variants(worker.family, pass_name, tokens)
            if worker.family == "xla" and plan.ragged:
                names = (*names, "ragged f32")
            for variant in names:
                case = _case(plan, shape, tokens, pass_name, worker.family, variant)
                entries.append(
                    Entry(case.label, worker, case, key(pass_name, baseline))
                )
    return _interleave(plan, _title(shape, tokens, plan.routing), entries, ktjax)


def skew(plan: Plan, shape: Shape, tokens: int, ktjax: Worker) -> Group:
    """A few popular experts against all alike."""
    entries = []
    for pass_name in plan.passes:
        for routing in cases.ROUTINGS:
            case = _case(plan, shape, tokens, pass_name, "ktjax", "save")
            case = dataclasses.replace(case, routing=routing)
            entries.append(
                Entry(f"ktjax {routing}", ktjax, case, key(pass_name, "ktjax uniform"))
            )
    return _interleave(plan, f"{_title(shape, tokens)}, routing", entries, ktjax)


def lora(plan: Plan, shape: Shape, tokens: int, ktjax: Worker) -> Group:
    """What adapters cost in the forward."""
    baseline = key("forward", "ktjax, no LoRA")
    case = _case(plan, shape, tokens, "forward", "ktjax", "save")
    entries = [Entry("ktjax, no LoRA", ktjax, case, baseline)]
    for rank in LORA_RANKS:
        case = dataclasses.replace(case, pass_name="lora", rank=rank)
        entries.append(Entry(f"ktjax, rank {rank}", ktjax, case, baseline))
    return _interleave(plan, f"{_title(shape, tokens)}, LoRA", entries, ktjax)


def storage(plan: Plan, shape: Shape, tokens: int, ktjax: Worker) -> Group:
    """Formats against bfloat16; the worker holds the plan's formats.

    Forwards also with activations in int8, where a format allows it: "forward int8",
    over the time of the bfloat16 forward.
    """
    names = ["bf16", *plan.formats]
    by_compute = {
        "bf16": names,
        "int8": [name for name in names if formats.encoding(name).spec.int8_compute],
    }
    entries = []
    for pass_name in plan.passes:
        if pass_name not in STORAGE_COMPUTES:
            continue
        case = _case(plan, shape, tokens, pass_name, "ktjax", "save")
        for compute in STORAGE_COMPUTES[pass_name]:
            for name in by_compute[compute]:
                stored = dataclasses.replace(case, format=name, compute=compute)
                entries.append(Entry(name, ktjax, stored, key(pass_name, "bf16")))
    title = f"{_title(shape, tokens, plan.routing)}, formats"
    return _interleave(plan, title, entries, ktjax)


def inference_methods() -> dict[str, tuple[str, str]]:
    """Names of `KTMoEWrapper`'s inference methods -> format of the weights, compute.

    Methods that are the same share a name. `LLAMAFILE` takes what a file has, so it is
    there with several formats.
    """
    found: dict[tuple[str, str], list[str]] = {}
    for name, method in experts_inference.METHODS.items():
        stored = GGUF_FORMATS if name == "LLAMAFILE" else method.formats[:1]
        for text in stored:
            mixed = f"{name} {text}" if name == "LLAMAFILE" else name
            chosen = formats.canonical(text), method.compute
            found.setdefault(chosen, []).append(mixed)
    return {", ".join(names): chosen for chosen, names in found.items()}


def methods(
    plan: Plan,
    shape: Shape,
    tokens: int,
    ktjax: Worker,
    chosen: dict[str, tuple[str, str]],
) -> Group:
    """Every inference method, as a pure call; of one token also the eager one.

    Args:
      plan: what the user asked for.
      shape: the layer.
      tokens: of a call.
      ktjax: the worker, which holds the formats.
      chosen: of `inference_methods`, "BF16" among them.
    """
    baseline = key("forward", "BF16")
    entries = []
    for name, (text, compute) in chosen.items():
        case = _case(plan, shape, tokens, "forward", "ktjax", "save")
        case = dataclasses.replace(case, format=text, compute=compute)
        entries.append(Entry(name, ktjax, case, baseline))
        if tokens == 1:
            eager = dataclasses.replace(case, variant="eager")
            entries.append(Entry(f"{name}, eager", ktjax, eager, baseline))
    title = f"{_title(shape, tokens, plan.routing)}, inference methods"
    return _interleave(plan, title, entries, ktjax)


def threads(
    plan: Plan, shape: Shape, tokens: int, ktjax: Worker, single: Worker
) -> Group:
    """One thread against all."""
    entries = []
    for pass_name in plan.passes:
        case = _case(plan, shape, tokens, pass_name, "ktjax", "save")
        baseline = key(pass_name, "ktjax, 1 thread")
        entries.append(Entry("ktjax, 1 thread", single, case, baseline))
        entries.append(Entry("ktjax, all threads", ktjax, case, baseline))
    return _interleave(plan, f"{_title(shape, tokens)}, threads", entries, ktjax)


def memory(
    plan: Plan, shape: Shape, tokens: int, families: Sequence[str]
) -> Iterator[MemoryRow]:
    """The train step of every contender, each library in a fresh process."""
    for family in families:
        with Worker(family) as worker:
            for variant in cases.variants(family, "train", tokens):
                case = _case(plan, shape, tokens, "train", family, variant)
                plan.report(f"{_title(shape, tokens)}, memory of {case.label}")
                yield _memory_of(case, worker)


def _memory_of(case: Case, worker: Worker) -> MemoryRow:
    worker.load(case.shape)
    if case.variant in cases.variants(case.family, "train", 1):
        # Code and tables of the libraries are not memory of the step.
        small = dataclasses.replace(case, tokens=1)
        worker.prepare(small)
        worker.run(small, 1)
    worker.prepare(case)
    used = worker.ask("memory", case=case.to_json(), calls=MEMORY_CALLS)
    own = case.family == "ktjax"
    return MemoryRow(
        shape=case.shape.name,
        tokens=case.tokens,
        contender=case.label,
        rank=case.rank,
        first_bytes=used["first"],
        peak_bytes=used["peak"],
        result_bytes=used["results"],
        scratch_bytes=worker.ask("workspace_bytes") if own else None,
    )


def profile(plan: Plan, shape: Shape, tokens: int, worker: Worker) -> Iterator[Profile]:
    """Seconds by phase; the worker runs with `KTJAX_PROFILE=1`."""
    for pass_name in plan.passes:
        for variant in cases.variants("ktjax", pass_name, tokens):
            case = _case(plan, shape, tokens, pass_name, "ktjax", variant)
            plan.report(f"{_title(shape, tokens)}, profile of {pass_name}")
            worker.prepare(case)
            worker.run(case, 1)
            worker.ask("profile")
            seconds = worker.run(case, PROFILED_CALLS)
            phases = worker.ask("profile")
            worker.ask("forget")
            yield Profile(
                shape=shape.name,
                tokens=tokens,
                pass_name=pass_name,
                contender=case.label,
                rank=plan.rank if case.adapted else 0,
                phase_ms={
                    name: 1e3 * total / PROFILED_CALLS
                    for name, (total, _) in phases.items()
                },
                wall_ms=1e3 * sum(seconds) / PROFILED_CALLS,
            )


def _case(
    plan: Plan, shape: Shape, tokens: int, pass_name: str, family: str, variant: str
) -> Case:
    return Case(shape, tokens, pass_name, family, variant, plan.rank, plan.routing)


def _title(shape: Shape, tokens: int, routing: str = "uniform") -> str:
    skewed = "" if routing == "uniform" else f", {routing} routing"
    cold = ", cold experts" if tokens == 1 else ""
    return f"{shape.name}, {tokens} token{'s' * (tokens != 1)}{cold}{skewed}"


def _interleave(
    plan: Plan, title: str, entries: list[Entry], peak_worker: Worker
) -> Group:
    return interleave(
        title,
        entries,
        peak_worker=peak_worker,
        rounds=plan.rounds,
        report=plan.report,
    )
