"""A whole training or generation, from a configuration to what the user sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from rich.console import Console

from ktjax.config import LoRAConfig
from ktjax.io.adapters import Adapter, AdapterError, read_adapter, write_adapter
from ktjax.models import (
    Decoder,
    Tokenizer,
    apply_adapter,
    from_pretrained,
    generate,
    generate_batch,
)
from ktjax.train import checkpoint
from ktjax.train.adapters import newest_checkpoint, read_run
from ktjax.train.answers import Answer, answer_chats
from ktjax.train.config import GenerateConfig, TrainConfig
from ktjax.train.data import Chat, read_chats, tokenize
from ktjax.train.loop import FitResult, fit
from ktjax.train.report import ProgressReport, match_table, sample_table


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """What a training did.

    Attributes:
      output_dir: where metrics.jsonl and checkpoints/ are; of the demo, adapter/ too.
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
    tokenizer = Tokenizer(config.model_path)
    chats = read_chats(config.train_path)
    questions = [] if config.eval_path is None else read_chats(config.eval_path)
    train = tokenize(chats, tokenizer, config.sequence_length)
    evaluation = tokenize(questions, tokenizer, config.sequence_length)
    model = _load(config, nnx.Rngs(config.seed))
    try:
        _describe(config, model, len(chats), len(questions), output_dir, console)

        def answer() -> list[Answer]:
            with console.status("answering the evaluation chats"):
                return _answer(model, tokenizer, questions, config)

        # The adapters start at zero, so before the training this is the base model.
        before = answer()
        with ProgressReport(console, config.steps) as report:
            result = fit(model, train, evaluation, config, output_dir, report)
        if result.interrupted:
            console.print(
                f"interrupted after step {result.step}, saved {result.checkpoint}; "
                "continue with the same options and: "
                f"--resume --output-dir {output_dir}",
                soft_wrap=True,
            )
            return TrainResult(output_dir, result, before, [])
        after = answer()
    finally:
        model.close()
    if after:
        console.print(match_table(before, after))
        console.print(sample_table(before, after))
    if config.model is None:
        # The demo shows the way to the end: a file that PEFT loads.
        exported = output_dir / "adapter"
        adapter = read_run(output_dir)
        write_adapter(exported, adapter, model.config.model_type, replace=True)
        console.print(
            f"the adapter in PEFT's format: {exported}", highlight=False, soft_wrap=True
        )
    console.print(
        f'try it: ktjax generate --run {output_dir} "your prompt"',
        highlight=False,
        soft_wrap=True,
    )
    return TrainResult(output_dir, result, before, after)


def run_generation(config: GenerateConfig, console: Console) -> None:
    """Answer one prompt on `console`, token by token.

    Raises:
      AdapterError, CheckpointError, ConfigError, TokenizerError, ValueError,
      FileNotFoundError: each says what is wrong and where.
    """
    adapter, lora = _adapter(config), None
    path = config.model or TrainConfig().model_path
    # Adapters belong to the very weights that they were trained on.
    base: dict[str, Any] = {"experts": "bf16", "group_size": None, "zero_point": False}
    if config.run is not None:
        trained = checkpoint.read_meta(newest_checkpoint(config.run))["config"]
        base |= {name: trained.get(name, value) for name, value in base.items()}
    if adapter is not None:
        lora = LoRAConfig(adapter.rank, adapter.alpha)
        path = config.model or _base_model(adapter)
    tokenizer = Tokenizer(path)
    if config.experts is not None:
        base = {name: getattr(config, name) for name in base}
    model = from_pretrained(
        path, **base, compute=config.compute, dtype=config.dtype, lora=lora
    )
    try:
        if adapter is not None:
            apply_adapter(model, adapter)
        messages = [{"role": "user", "content": config.prompt}]
        if config.system is not None:
            messages.insert(0, {"role": "system", "content": config.system})
        tokens = generate(
            model,
            tokenizer.apply_chat_template(messages, add_generation_prompt=True),
            config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            key=jax.random.key(config.seed),
            eos_ids=_end_ids(model, tokenizer),
        )
        for piece in tokenizer.decode_stream(tokens):
            console.out(piece, end="", highlight=False)
        console.out("")
    finally:
        model.close()


def _load(config: TrainConfig, rngs: nnx.Rngs) -> Decoder:
    return from_pretrained(
        config.model_path,
        experts=config.experts,
        group_size=config.group_size,
        zero_point=config.zero_point,
        dtype=config.dtype,
        lora=LoRAConfig(config.lora_rank, config.lora_alpha),
        activation_policy=config.activation_policy,
        rngs=rngs,
    )


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
        ends = _end_ids(model, tokenizer)
        answers = generate_batch(model, ids, config.answer_tokens, eos_ids=ends)
        return [tokenizer.decode(tokens) for tokens in answers]

    answers = answer_chats(chats[: config.answers], answer, config.eval_batch)
    model.train()
    return answers


def _end_ids(model: Decoder, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer, by the model's and by the tokenizer's account."""
    ends = set(model.config.eos_token_ids)
    return sorted(ends if tokenizer.eos_id is None else ends | {tokenizer.eos_id})


def _describe(
    config: TrainConfig,
    model: Decoder,
    chats: int,
    questions: int,
    output_dir: Path,
    console: Console,
) -> None:
    adapters: Any = jax.tree.leaves(nnx.state(model, nnx.LoRAParam))
    trained = sum(leaf.size for leaf in adapters)
    geometry = model.config
    console.print(
        f"model   {config.model_path}\n"
        f"        {geometry.num_hidden_layers} layers, {geometry.num_experts} experts, "
        f"{geometry.num_experts_per_tok} per token; LoRA of rank {config.lora_rank} on "
        f"the experts: {trained:,} trained parameters\n"
        f"data    {config.train_path} ({chats:,} chats), "
        f"{questions:,} evaluation chats\n"
        f"output  {output_dir}",
        highlight=False,
        soft_wrap=True,
    )


def _adapter(config: GenerateConfig) -> Adapter | None:
    if config.run is not None:
        return read_run(config.run)
    return None if config.adapter is None else read_adapter(config.adapter)


def _base_model(adapter: Adapter) -> Path:
    path = Path(adapter.base_model or "")
    if not adapter.base_model or not path.is_dir():
        raise AdapterError(
            f"the adapter's base model {adapter.base_model!r} is no directory here; "
            "name the model's directory with --model"
        )
    return path


def _free_directory(parent: Path) -> Path:
    """The first of parent/1, parent/2, ... that does not exist."""
    number = 1
    while (parent / str(number)).exists():
        number += 1
    return parent / str(number)
