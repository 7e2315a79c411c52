"""The loss over a vocabulary, whole and in chunks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktjax.nn import token_losses

VOCAB, WIDTH = 50, 8


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.standard_normal((2, 7, WIDTH), np.float32))
    head = jnp.asarray(rng.standard_normal((WIDTH, VOCAB), np.float32))
    return hidden, head, jnp.asarray(rng.integers(0, VOCAB, (2, 7), np.int32))


def loss_and_gradients(arrays, chunk_values):
    hidden, head, targets = arrays

    def loss(hidden, head):
        losses = token_losses(
            lambda rows: rows @ head, hidden, targets, VOCAB, chunk_values=chunk_values
        )
        # Every token counts for itself.
        return jnp.sum(losses * jnp.arange(losses.size).reshape(losses.shape)), losses

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)


# Of 14 tokens: three chunks with a padded one, a token each, no room for one.
@pytest.mark.parametrize("chunk_values", [5 * VOCAB, VOCAB, 1])
def test_chunks_change_nothing(arrays, chunk_values):
    (_, want), grads = loss_and_gradients(arrays, 14 * VOCAB)
    (_, got), chunked = loss_and_gradients(arrays, chunk_values)
    assert got.shape == (2, 7)
    assert got.dtype == jnp.float32
    # float32 sums of 50 exponentials and of 14 tokens, in another order.
    np.testing.assert_allclose(got, want, rtol=1e-5)
    for a, b in zip(grads, chunked, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_it_is_the_cross_entropy(arrays):
    hidden, head, targets = arrays
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    chosen = np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]
    want = np.log(np.exp(logits).sum(-1)) - chosen
    (_, got), _ = loss_and_gradients(arrays, 3 * VOCAB)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_no_array_has_the_logits_of_more_than_a_chunk(arrays):
    """In the forward and the backward."""
    compiled = jax.jit(lambda *a: loss_and_gradients(a, 3 * VOCAB)).lower(*arrays)
    sizes = [
        int(np.prod([int(n) for n in dims.split("x")[:-1]]))
        for dims in _tensors(compiled.as_text())
        if f"{VOCAB}x" in dims
    ]
    assert sizes
    assert max(sizes) <= max(3 * VOCAB, VOCAB * WIDTH)


def _tensors(text):
    """The "2x7x50xf32" of every tensor type in StableHLO."""
    return [part.split(">")[0] for part in text.split("tensor<")[1:]]
