"""A whole training, from a configuration to what the user sees."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from flax import nnx
from rich.console import Console

from ktjax.io.adapters import AdapterError, said
from ktjax.io.adapters.names import kind_of
from ktjax.models import (
    Decoder,
    Tokenizer,
    apply_adapter,
    end_ids,
    from_pretrained,
    generate_batch,
    random_streams,
)
from ktjax.models.adapters import strength_of
from ktjax.models.targets import adapted
from ktjax.train.adapters import read_run_or_adapter
from ktjax.train.answers import Answer, answer_chats
from ktjax.train.config import TrainConfig
from ktjax.train.config_file import write_config_file
from ktjax.train.curve import draw_curve, sparkline
from ktjax.train.data import Chat, read_chats, split_chats, tokenize
from ktjax.train.demo import finish_demo
from ktjax.train.loop import FitResult, fit, refuse_old_run
from ktjax.train.metrics import read_metrics
from ktjax.train.report import ProgressReport, match_table, sample_table
from ktjax.train.trainable import parts_of, parts_table

CONFIG_NAME = "config.yaml"
# Formats that change no value of a checkpoint in bfloat16.
_EXACT_EXPERTS = (None, "auto", "bf16", "reference")
_EXACT_DENSE = (None, "bf16", "xla")


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
      output_dir: where config.yaml, metrics.jsonl and checkpoints/ are; of the demo,
        adapter/ and merged/ too.
      fit: how the loop ended.
      before: answers of the base model.
      after: answers of the trained one; empty when interrupted.
    """

    output_dir: Path
    fit: FitResult
    before: list[Answer]
    after: list[Answer]


def run_training(config: TrainConfig, console: Console) -> TrainResult:
    """Load, evaluate, train, evaluate, and show it all on `console`.

    Raises:
      DataError, TokenizerError, ConfigError, CheckpointError, TrainingError,
      ValueError, FileNotFoundError: each says what is wrong and where.
    """
    output_dir = config.output_dir or _free_directory(Path("runs"))
    if not config.resume:
        refuse_old_run(output_dir)
    tokenizer = Tokenizer(config.model_path)
    read = functools.partial(read_chats, preferences=config.objective == "dpo")
    chats = read(config.train_path)
    questions = [] if config.eval_path is None else read(config.eval_path)
    if config.eval_split:
        chats, questions = split_chats(chats, config.eval_split, config.seed)
    train = tokenize(chats, tokenizer, config.sequence_length)
    evaluation = tokenize(questions, tokenizer, config.sequence_length)
    model = _load(config, random_streams(config.seed))
    try:
        if config.init_adapter is not None:
            _start_from(model, config)
        if not (output_dir / CONFIG_NAME).exists() or not config.resume:
            output_dir.mkdir(parents=True, exist_ok=True)
            settings = dataclasses.replace(config, output_dir=output_dir)
            write_config_file(output_dir / CONFIG_NAME, settings)
        _describe(config, model, len(chats), len(questions), output_dir, console)

        def answer() -> list[Answer]:
            with console.status("answering the evaluation chats"):
                return _answer(model, tokenizer, questions, config)

        # Adapters that start at zero are the base model.
        before = answer()
        with ProgressReport(console, config.steps) as report:
            result = fit(model, train, evaluation, config, output_dir, report)
        if result.interrupted:
            console.print(
                f"interrupted after step {result.step}, saved; continue with: "
                f"ktjax train {output_dir / CONFIG_NAME} --resume",
                soft_wrap=True,
            )
            return TrainResult(output_dir, result, before, [])
        _show_curve(output_dir, console)
        if config.patience:
            early = f"stopped early, after step {result.step}; " * result.stopped_early
            _say(
                console, f"{early}best evaluation: {result.checkpoint}, used from here"
            )
        after = answer()
        if after:
            console.print(match_table(before, after))
            console.print(sample_table(before, after))
        if config.model is None:  # the demo shows the way to the end
            finish_demo(
                model,
                config.model_path,
                output_dir,
                functools.partial(_say, console),
                incomparable=_incomparable(config),
            )
    finally:
        model.close()
    _say(console, f'try it: ktjax generate --run {output_dir} "your prompt"')
    return TrainResult(output_dir, result, before, after)


def _incomparable(config: TrainConfig) -> str:
    """Why the model has other values than its checkpoint in float32, or nothing."""
    if config.dtype != "float32":
        return f"the model computes in {config.dtype}"
    if config.experts not in _EXACT_EXPERTS or config.dense not in _EXACT_DENSE:
        return "the base is quantised"
    return ""


def _load(config: TrainConfig, rngs: nnx.Rngs) -> Decoder:
    return from_pretrained(
        config.model_path,
        experts=config.experts,
        group_size=config.group_size,
        zero_point=config.zero_point,
        dense=config.dense,
        dtype=config.dtype,
        lora=config.lora,
        activation_policy=config.activation_policy,
        remat=config.remat,
        rngs=rngs,
    )


def _start_from(model: Decoder, config: TrainConfig) -> None:
    """Give `model` the adapters in `config.init_adapter`.

    Raises:
      AdapterError: they do not fit the model, or the options.
    """
    assert config.init_adapter is not None
    adapter = read_run_or_adapter(config.init_adapter)
    modules = adapted(model)
    if modules.keys() != dict(adapter.items()).keys():
        raise AdapterError(
            f"{config.init_adapter} adapts {adapter.summary()}, the options say "
            f"targets = {config.targets}; give its own"
        )
    for place, module in modules.items():
        own, wanted = strength_of(module), adapter.strength(place)
        if own.rank != wanted.rank or not math.isclose(own.scaling, wanted.scaling):
            raise AdapterError(
                f"{config.init_adapter} has rank {wanted.rank} and scaling "
                f"{wanted.scaling:g} in {said(place)}, the options say "
                f"{own.rank} and {own.scaling:g}; give its lora_rank and "
                "lora_alpha (= scaling * rank, or rslora)"
            )
    apply_adapter(model, adapter)


def _answer(
    model: Decoder, tokenizer: Tokenizer, chats: Sequence[Chat], config: TrainConfig
) -> list[Answer]:
    """Greedy answers to the first `config.answers` chats."""
    model.eval()

    def answer(prompts: Sequence[Sequence[dict[str, str]]]) -> list[str]:
        ids = [
            tokenizer.apply_chat_template(prompt, add_generation_prompt=True)
            for prompt in prompts
        ]
        ends = end_ids(model, tokenizer)
        answers = generate_batch(model, ids, config.answer_tokens, eos_ids=ends)
        return [tokenizer.decode(tokens) for tokens in answers]

    answers = answer_chats(chats[: config.answers], answer, config.eval_batch)
    model.train()
    return answers


def _describe(
    config: TrainConfig,
    model: Decoder,
    chats: int,
    questions: int,
    output_dir: Path,
    console: Console,
) -> None:
    geometry = model.config
    modules = adapted(model)
    ranks = sorted({m.lora_rank for m in modules.values()}, reverse=True)
    kinds = (kind_of(p) if isinstance(p, str) else "the experts" for p in modules)
    console.print(
        f"model   {config.model_path}\n"
        f"        {geometry.num_hidden_layers} layers, {geometry.num_experts} experts, "
        f"{geometry.num_experts_per_tok} per token; LoRA of rank "
        f"{', '.join(map(str, ranks))} on {', '.join(dict.fromkeys(kinds))}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(parts_table(parts_of(model)), highlight=False)
    console.print(
        f"data    {config.train_path} ({chats:,} chats), "
        f"{questions:,} evaluation chats\n"
        f"output  {output_dir}",
        highlight=False,
        soft_wrap=True,
    )


def _show_curve(output_dir: Path, console: Console) -> None:
    """The losses as a picture, and in a line of text."""
    metrics, picture = output_dir / "metrics.jsonl", output_dir / "loss.png"
    losses = [loss for _, loss in read_metrics(metrics, "loss")]
    drawn = draw_curve(metrics, picture)
    where = f"  {picture}" if drawn else "  (pip install 'ktjax[plot]' for a picture)"
    _say(
        console, f"loss    {losses[0]:.3f} {sparkline(losses)} {losses[-1]:.3f}{where}"
    )


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def _free_directory(parent: Path) -> Path:
    """The first of parent/1, parent/2, ... that does not exist."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)
