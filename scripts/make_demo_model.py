"""Train the demo base model: `python scripts/make_demo_model.py --out DIR`.

Writes a Hugging Face directory with a Qwen3-MoE of 0.8 million parameters in BF16: a
character tokenizer, a chat template, and weights trained from scratch on the string
tasks of make_demo_data.py (5 minutes on two cores). The model here is a compact
pure-JAX forward with full-parameter training; a test holds its logits against
`ktjax.models`.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from safetensors.numpy import save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent))
from make_demo_data import BASE_TASKS, LONGEST, held_out, make_word
from qwen3_moe import Sizes

Params = dict[str, Any]

SPECIAL = ["<pad>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
CHARACTERS = ["\n", *(chr(code) for code in range(32, 127))]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# hidden % 64 == 0 and intermediate % 32 == 0.
SIZES = Sizes(
    layers=3,
    experts=8,
    experts_per_token=2,
    hidden=128,
    intermediate=64,
    heads=4,
    kv_heads=2,
    head_dim=32,
    vocab=128,
)
POSITIONS = 512
ROPE_THETA = 10_000.0
EPS = 1e-6


def make_tokenizer() -> Tokenizer:
    """One token per character; the roles and the end of a turn are special tokens."""
    vocab = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    return tokenizer


def init_params(shape: Sizes, key: jax.Array) -> Params:
    """Float32 parameters; a layer is a dict, the experts are stacked."""
    keys = iter(jax.random.split(key, 2 + 8 * shape.layers))
    h, i, e, d = shape.hidden, shape.intermediate, shape.experts, shape.head_dim

    def matrix(*dims: int) -> jax.Array:
        return jax.random.normal(next(keys), dims) * dims[-1] ** -0.5

    def layer() -> Params:
        return {
            "norm1": jnp.ones(h),
            "norm2": jnp.ones(h),
            "q_norm": jnp.ones(d),
            "k_norm": jnp.ones(d),
            "q": matrix(shape.heads * d, h),
            "k": matrix(shape.kv_heads * d, h),
            "v": matrix(shape.kv_heads * d, h),
            "o": matrix(h, shape.heads * d),
            "router": matrix(e, h),
            "gate": matrix(e, i, h),
            "up": matrix(e, i, h),
            "down": matrix(e, h, i),
        }

    return {
        "embed": matrix(shape.vocab, h),
        "head": matrix(shape.vocab, h),
        "norm": jnp.ones(h),
        "layers": [layer() for _ in range(shape.layers)],
    }


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale over the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def rotate(x: jax.Array, theta: float) -> jax.Array:
    """Rotary embedding of `[batch, sequence, heads, head_dim]`, halves convention."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half) / half)
    angle = jnp.arange(x.shape[1])[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    left, right = x[..., :half], x[..., half:]
    return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], -1)


def attention(shape: Sizes, p: Params, x: jax.Array) -> jax.Array:
    """Causal grouped-query attention with QK-norm: `[batch, sequence, hidden]`."""
    split = (*x.shape[:2], -1, shape.head_dim)
    q = rms_norm((x @ p["q"].T).reshape(split), p["q_norm"], EPS)
    k = rms_norm((x @ p["k"].T).reshape(split), p["k_norm"], EPS)
    v = (x @ p["v"].T).reshape(split)
    q, k = rotate(q, ROPE_THETA), rotate(k, ROPE_THETA)
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    return out.reshape(*x.shape[:2], -1) @ p["o"].T


def experts(shape: Sizes, p: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All experts on all tokens, then the routed mixture; also the balance loss."""
    probabilities = jax.nn.softmax(x @ p["router"].T, -1)
    top, ids = jax.lax.top_k(probabilities, shape.experts_per_token)
    chosen = jax.nn.one_hot(ids, shape.experts)
    weights = jnp.einsum("bsk,bske->bse", top / top.sum(-1, keepdims=True), chosen)
    gate = jnp.einsum("bsh,eih->bsei", x, p["gate"])
    up = jnp.einsum("bsh,eih->bsei", x, p["up"])
    hidden = jax.nn.silu(gate) * up * weights[..., None]
    share = chosen.sum(2).mean((0, 1))
    balance = shape.experts * jnp.sum(share * probabilities.mean((0, 1)))
    return jnp.einsum("bsei,ehi->bsh", hidden, p["down"]), balance


def forward(
    shape: Sizes, params: Params, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits `[batch, sequence, vocab]` of `ids`, and the mean balance loss."""
    x, balance = params["embed"][ids], jnp.zeros(())
    for p in params["layers"]:
        x = x + attention(shape, p, rms_norm(x, p["norm1"], EPS))
        out, layer_balance = experts(shape, p, rms_norm(x, p["norm2"], EPS))
        x, balance = x + out, balance + layer_balance / shape.layers
    return rms_norm(x, params["norm"], EPS) @ params["head"].T, balance


def make_batch(
    rng: random.Random, tokenizer: Tokenizer, size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """`size` chats: ids `[size, length]` int32 and the mask of the answers' tokens."""
    ids, mask = np.zeros((size, length), np.int32), np.zeros((size, length), np.float32)
    tasks = list(BASE_TASKS)
    for row in range(size):
        task, word = rng.choice(tasks), make_word(rng)
        while held_out(word):
            word = make_word(rng)
        prompt = tokenizer.encode(f"<|user|>{task}: {word}<|end|><|assistant|>").ids
        answer = tokenizer.encode(f"{BASE_TASKS[task](word)}<|end|>").ids
        end = len(prompt) + len(answer)
        ids[row, :end] = prompt + answer
        mask[row, len(prompt) : end] = 1
    return ids, mask


def make_step(shape: Sizes, optimizer: optax.GradientTransformation) -> Any:
    """The jitted update: (params, state, ids, mask) -> (params, state, loss)."""

    def loss_fn(params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
        logits, balance = forward(shape, params, ids[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        weight = mask[:, 1:]
        return jnp.sum(losses * weight) / weight.sum() + 0.01 * balance

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Params, state: Any, ids: jax.Array, mask: jax.Array) -> Any:
        loss, grads = jax.value_and_grad(loss_fn)(params, ids, mask)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(shape: Sizes, tokenizer: Tokenizer, args: argparse.Namespace) -> Params:
    """Train from scratch; prints the loss every 100 steps."""
    schedule = optax.warmup_cosine_decay_schedule(0, args.rate, 100, args.steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.99, weight_decay=0.01),
    )
    params = init_params(shape, jax.random.key(args.seed))
    state, step = optimizer.init(params), make_step(shape, optimizer)
    rng, start = random.Random(args.seed), time.monotonic()
    # The longest chat: "double: " + word, the doubled word, four special tokens.
    length = len("double: ") + 3 * LONGEST + 4
    for number in range(1, args.steps + 1):
        batch = make_batch(rng, tokenizer, args.batch, length)
        params, state, loss = step(params, state, *batch)
        if number % 100 == 0:
            elapsed = time.monotonic() - start
            print(f"step {number}  loss {loss:.4f}  {elapsed:.0f} s", flush=True)
    return params


def to_tensors(params: Params) -> dict[str, np.ndarray]:
    """Hugging Face's names and layout, in BF16."""
    tensors = {
        "model.embed_tokens.weight": params["embed"],
        "model.norm.weight": params["norm"],
        "lm_head.weight": params["head"],
    }
    for number, p in enumerate(params["layers"]):
        at = f"model.layers.{number}"
        tensors[f"{at}.input_layernorm.weight"] = p["norm1"]
        tensors[f"{at}.post_attention_layernorm.weight"] = p["norm2"]
        for name in "qkvo":
            tensors[f"{at}.self_attn.{name}_proj.weight"] = p[name]
        tensors[f"{at}.self_attn.q_norm.weight"] = p["q_norm"]
        tensors[f"{at}.self_attn.k_norm.weight"] = p["k_norm"]
        tensors[f"{at}.mlp.gate.weight"] = p["router"]
        for name in ("gate", "up", "down"):
            for expert, weight in enumerate(p[name]):
                tensors[f"{at}.mlp.experts.{expert}.{name}_proj.weight"] = weight
    return {
        name: np.asarray(tensor).astype(ml_dtypes.bfloat16)
        for name, tensor in tensors.items()
    }


def save_model(shape: Sizes, params: Params, tokenizer: Tokenizer, out: Path) -> None:
    """Write the configuration, the weights, and the tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    eos, pad = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<pad>")
    weights = save(to_tensors(params), metadata={"format": "pt"})
    (out / "model.safetensors").write_bytes(weights)
    tokenizer.save(str(out / "tokenizer.json"))
    documents = {
        "config.json": shape.config(
            positions=POSITIONS, theta=ROPE_THETA, eps=EPS, eos=eos, pad=pad
        ),
        "generation_config.json": {"eos_token_id": eos, "pad_token_id": pad},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|end|>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "model_max_length": POSITIONS,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    }
    for name, content in documents.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def accuracy(shape: Sizes, params: Params, tokenizer: Tokenizer) -> float:
    """Share of held-out style chats whose every answer token is the most likely one."""
    length = len("double: ") + 3 * LONGEST + 4
    ids, mask = make_batch(random.Random(-1), tokenizer, 256, length)
    logits, _ = jax.jit(functools.partial(forward, shape))(params, ids[:, :-1])
    right = (logits.argmax(-1) == ids[:, 1:]) | (mask[:, 1:] == 0)
    return float(right.all(-1).mean())


def main() -> None:
    """Train and write the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the demo base model.")
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape, tokenizer = SIZES, make_tokenizer()
    params = train(shape, tokenizer, args)
    rounded = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), params)
    match = accuracy(shape, rounded, tokenizer)
    print(f"exact match of the saved weights: {match:.3f}")
    save_model(shape, params, tokenizer, args.out)


if __name__ == "__main__":
    main()
