"""A tiny stand-in for a language model and its tokenizer."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktjax.nn import Routing, token_losses
from ktjax.train.config import TrainConfig
from ktjax.train.data import Chat, Example

VOCAB, WIDTH, RANK = 32, 16, 4


class StandIn(nnx.Module):
    """Embedding, a causal mean over the segment, dropout, a LoRA layer, a head."""

    def __init__(self, seed: int = 0, dropout: float = 0.1):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)
        self.a = nnx.LoRAParam(jax.random.normal(rngs.params(), (WIDTH, RANK)))
        self.b = nnx.LoRAParam(jnp.zeros((RANK, WIDTH)))

    def token_losses(self, input_ids, targets, *, positions, segment_ids):
        x = self.embed(input_ids) * jnp.cos(positions)[..., None]
        length = input_ids.shape[1]
        seen = segment_ids[:, :, None] == segment_ids[:, None, :]
        seen = (seen & np.tri(length, dtype=bool)).astype(x.dtype)
        x = x + seen @ x / seen.sum(-1, keepdims=True)
        x = self.dropout(x + jnp.tanh(x @ self.a[...] @ self.b[...]))
        # A load that does not depend on the batch: then the balancing loss is linear in
        # the tokens, and micro-batches add up to the loss of one big batch.
        routing = Routing(
            load=jnp.array([1.5, 0.5, 0.0, 0.0]),
            probability=jnp.mean(jax.nn.softmax(x[..., :4]), axis=(0, 1)),
        )
        return token_losses(self.head, x, targets, VOCAB), (routing,)


class LetterTokenizer:
    """One id per letter of the message, an id per role before it, 31 after it."""

    def encode_chat(self, messages):
        ids, learn = [], []
        for message in messages:
            mine = message["role"] == "assistant"
            letters = [ord(letter) - ord("a") for letter in message["content"]]
            ids += [28 + mine, *letters, 31]
            learn += [False, *[mine] * (len(letters) + 1)]
        return ids, learn


def chat(prompt, answer):
    messages = (
        {"role": "user", "content": prompt},
        {"role": "assistant", "content": answer},
    )
    return Chat(messages, "test")


def make_examples(count, seed=0, longest=12):
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(3, longest + 1))
        learn = np.arange(length) >= rng.integers(1, length - 1)
        examples.append(Example(rng.integers(0, VOCAB, length, np.int32), learn))
    return examples


def make_config(**changes):
    settings = {
        "steps": 6,
        "warmup_steps": 2,
        "batch_size": 4,
        "sequence_length": 16,
        "bucket": 8,
        "learning_rate": 1e-2,
        "eval_every": 0,
        "eval_batch": 4,
        "checkpoint_every": 0,
    }
    return TrainConfig(**{**settings, **changes})


class Silent:
    """An observer that remembers."""

    def __init__(self):
        self.steps, self.evaluations, self.saved = [], [], []

    def on_step(self, metrics):
        self.steps.append(metrics)

    def on_evaluation(self, step, loss):
        self.evaluations.append((step, loss))

    def on_checkpoint(self, path):
        self.saved.append(path)


class StopAt(Silent):
    """Presses Ctrl-C once the given step is done."""

    def __init__(self, step):
        super().__init__()
        self.stop = step

    def on_step(self, metrics):
        super().on_step(metrics)
        if metrics["step"] == self.stop:
            os.kill(os.getpid(), signal.SIGINT)
