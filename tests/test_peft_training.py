"""Training against torch and PEFT: the same checkpoint, batch and adapter.

Everything is float32 and the weights are bfloat16 numbers, which stores hold exactly,
so both sides compute the same function. How far apart they may be:

* With `experts="reference"` the model is plain JAX in float32, as torch's is. Sums of
  up to 400 terms in another order are some 20 * 2^-24 apart, and ten such products
  follow one another in a gradient.
* The kernels split a float32 operand into two bfloat16 parts (design.md, Precision) and
  promise 0.006 / 256 of a layer (README, Accuracy).

Both are far within what is asked for: 1e-5 of the loss and 1e-3 of every gradient after
one step, 1e-3 of the losses of twenty.
"""

from __future__ import annotations

import functools
import math
import tempfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closeness import relative
from flax import nnx

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from adapter_cases import make_lora
from models_checkpoint import FAMILIES, SIZES, make_model, save, torch
from peft_cases import load_peft, writes_for_peft
from train_standin import make_config

from ktjax.io import Adapter, read_adapter, write_adapter
from ktjax.lora import LoRA
from ktjax.models import apply_adapter, decoder, extract_adapter, from_pretrained
from ktjax.nn import token_losses
from ktjax.train.batching import Batcher
from ktjax.train.data import Example
from ktjax.train.step import (
    init_state,
    make_optimizer,
    make_train_step,
    split_model,
)

pytestmark = writes_for_peft

RANK, ALPHA, STEPS = 4, 6.0, 20
VOCAB = SIZES["vocab_size"]

# The layouts are the same LoRA in other files; the experts decide what computes.
CASES = {
    "qwen3_moe": ("qwen3_moe", "peft", "reference"),
    "qwen3_moe fused kernels": ("qwen3_moe", "peft-fused", "bf16"),
    "qwen2_moe kernels": ("qwen2_moe", "peft-fused", "bf16"),
    "deepseek_v3": ("deepseek_v3", "peft", "reference"),
    "deepseek_v3 kernels": ("deepseek_v3", "peft", "bf16"),
}
# See above; the kernels' is twice what they promise of a layer.
GRADIENT = {"reference": 2**-16, "bf16": 2 * 0.006 / 256}


class Side(NamedTuple):
    """What one of the two says of a training."""

    losses: list[float]  # of every step, before its update
    gradients: dict[int, LoRA]  # of the first step, clipped, by layer
    adapters: dict[int, LoRA]  # after the last step


@functools.cache
def examples():
    """Texts of unequal length, whose first tokens are not learnt."""
    rng = np.random.default_rng(7)
    return [
        Example(rng.integers(2, VOCAB, n, np.int32), np.arange(n) >= 3)
        for n in (18, 9, 14, 7, 16, 11)
    ]


def make_training(**changes):
    """As `ktjax train` has it: packed rows, micro-batches, a schedule, a clip."""
    settings = {
        "batch_size": 2,
        "accumulation": 2,
        "sequence_length": 24,
        "steps": STEPS,
        "warmup_steps": 5,
        "learning_rate": 1e-2,
        "weight_decay": 0.05,
        # Below the first gradients' norm, above the last ones'.
        "clip_norm": 0.5,
    }
    return make_config(**{**settings, **changes})


def ours(path, adapter, config, **options) -> Side:
    """ktjax: the optimizer steps of `ktjax.train` on one batch."""
    lora = adapter.lora_config()
    model = from_pretrained(path, dtype=jnp.float32, lora=lora, **options)
    try:
        apply_adapter(model, adapter)
        split = split_model(model)
        batcher = Batcher.from_config(config, config.batch_size * config.accumulation)
        (batch,) = batcher.once(examples())
        step = make_train_step(split.graph, config)
        state = init_state(split, make_optimizer(config))
        losses = []
        for _ in range(config.steps):
            state, metrics = step(state, split.frozen, batch)
            losses.append(float(metrics["loss"]))
            if len(losses) == 1:
                # AdamW's first moment is now a tenth of the gradient.
                moment = optax.tree_utils.tree_get(state.optimizer, "mu")
                nnx.update(model, jax.tree.map(lambda m: m / (1 - 0.9), moment))
                gradients = extract_adapter(model).layers
        nnx.update(model, state.lora)
        return Side(losses, gradients, extract_adapter(model).layers)
    finally:
        model.close()


def theirs(path, adapter, config) -> Side:
    """torch and PEFT: a text a row, transformers' loss, torch's AdamW and clip."""
    model = load_peft(path, adapter, is_trainable=True)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    # PEFT makes one LoRA of twice the rank of gate's and up's (they are one parameter
    # in transformers 5): B = [[B_gate, 0], [0, B_up]]. It would train the zeros too.
    for parameter in trained.values():
        parameter.register_hook(lambda g, used=parameter != 0: g * used)
    optimizer = torch.optim.AdamW(
        trained.values(), config.learning_rate, weight_decay=config.weight_decay
    )
    batch = _padded(examples())
    losses, gradients = [], {}
    for number in range(config.steps):
        optimizer.param_groups[0]["lr"] = _rate(number, config)
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        losses.append(loss.item())
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
        if number == 0:
            gradients = _saved(model, {n: p.grad for n, p in trained.items()})
        optimizer.step()
    return Side(losses, gradients, _saved(model, {}))


def _rate(step, config):
    """The learning rate of a step: linear warm-up, then a cosine."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / (config.warmup_steps + 1)
    done = (step - config.warmup_steps) / (config.steps - config.warmup_steps)
    share = 0.5 * (1 + math.cos(math.pi * done))
    return config.learning_rate * (config.final_rate + (1 - config.final_rate) * share)


def _padded(texts):
    """One text a row; what is not learnt has no label."""
    longest = max(map(len, texts))
    shape = (len(texts), longest)
    ids, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text.ids, 1
        labels[row, : len(text)] = np.where(text.learn, text.ids, -100)
    arrays = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: torch.tensor(array) for name, array in arrays.items()}


def _saved(model, values):
    """The adapters as PEFT saves and ktjax reads them, with `values` in their place."""
    parameters = dict(model.named_parameters())
    own = {name: parameters[name].detach().clone() for name in values}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)
        model.save_pretrained(folder)
        for name, value in own.items():
            parameters[name].copy_(value)
        return read_adapter(folder).layers


def differences(got, want):
    """Relative errors of every adapter array, by layer and name."""
    assert got.keys() == want.keys()
    return {
        f"{index} {name}": relative(getattr(got[index], name), getattr(lora, name))
        for index, lora in want.items()
        for name in LoRA.NAMES
    }


def make_adapter(path, family):
    """An adapter of every layer with experts, with a B that is not zero."""
    config = FAMILIES[family]
    experts = config.get("num_experts", config.get("n_routed_experts"))
    layers = {
        index: LoRA(
            *(
                np.float32(0.2) * array
                for array in make_lora(
                    index,
                    experts=experts,
                    hidden=config["hidden_size"],
                    width=config["moe_intermediate_size"],
                    rank=RANK,
                ).arrays()
            )
        )
        for index in range(config.get("first_k_dense_replace", 0), 2)
    }
    return Adapter(RANK, ALPHA, layers, str(path))


@pytest.mark.parametrize("name", CASES)
def test_training_equals_torch_and_peft(name, tmp_path, monkeypatch):
    family, layout, experts = CASES[name]
    # Rows of 24 tokens: the logits of a micro-batch are computed in four chunks.
    chunked = functools.partial(token_losses, chunk_values=12 * VOCAB)
    monkeypatch.setattr(decoder, "token_losses", chunked)
    path = save(make_model(seed=2, family=family), tmp_path / "model")
    adapter = make_adapter(path, family)
    write_adapter(tmp_path / "adapter", adapter, family, layout=layout)
    config = make_training()
    got = ours(path, adapter, config, experts=experts)
    want = theirs(path, tmp_path / "adapter", config)

    # One step: the loss, and every array's gradient.
    assert got.losses[0] == pytest.approx(want.losses[0], rel=1e-6)
    errors = differences(got.gradients, want.gradients)
    assert max(errors.values()) <= GRADIENT[experts], errors
    # All steps. AdamW divides by a gradient's size: where that is as small as its
    # error, the update is anything up to the learning rate.
    np.testing.assert_allclose(got.losses, want.losses, rtol=1e-4)
    assert max(differences(got.adapters, want.adapters).values()) <= 1e-3
    assert got.losses[-1] < 0.5 * got.losses[0]
