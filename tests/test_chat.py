"""ktjax chat: what it answers, its commands, and the adapter switched on and off."""

import io

import jax
import numpy as np
import pytest
from adapter_cases import make_lora
from flax import nnx
from rich.console import Console

from ktjax import assets
from ktjax.commands import ChatConfig, chat, run_chat
from ktjax.commands.chat import AdapterSwitch
from ktjax.config import LoRAConfig
from ktjax.io import Adapter, write_adapter
from ktjax.lora import LoRA
from ktjax.models import from_pretrained

SIZES = {"experts": 8, "hidden": 128, "width": 64, "rank": 4}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter that is far from zero."""
    path = tmp_path_factory.mktemp("adapter") / "a"
    layers = {
        i: LoRA(*(np.float32(0.3) * a for a in make_lora(i, **SIZES).arrays()))
        for i in range(3)
    }
    write_adapter(path, Adapter(4, 6.0, layers, str(assets.demo_model())), "qwen3_moe")
    return path


def talk(*lines, **options):
    """What the terminal shows after each line."""
    screen = io.StringIO()
    console = Console(file=screen, width=200)
    rest, shown = iter(lines), []

    def read(prompt):
        assert prompt == "> "
        shown.append(screen.getvalue())
        screen.seek(0)
        screen.truncate()
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    run_chat(ChatConfig(max_new_tokens=12, **options), console, read)
    return shown[1:]


def test_answers_and_commands():
    hint = "there is no adapter; start with --run or --adapter\n"
    lines = (
        "copy: fox",
        "",
        "/reset",
        "  reverse: fox ",
        "/adapter off",
        "/fly",
        "/exit",
    )
    assert talk(*lines) == [
        "fox\n",
        "",
        "forgotten\n",
        "xof\n",
        hint,
        "/fly is no command; /help lists them\n",
    ]
    (shown,) = talk("/help")
    assert "/adapter off    answer as the base model" in shown


def test_with_and_without_the_adapter(adapter):
    on, off, _, plain, on_again, both, _, again = talk(
        "copy: fox",
        "/adapter off",
        "/reset",
        "copy: fox",
        "/adapter on",
        "/compare",
        "/reset",
        "copy: fox",
        adapter=adapter,
    )
    assert plain == "fox\n"
    assert on != plain
    assert off == "the adapter is off\n"
    assert on_again == "the adapter is on\n"
    assert both == "comparing is on\n"
    assert again.startswith("base     fox\nadapter  ")


def test_comparing_from_the_start(adapter):
    (shown,) = talk("copy: fox", adapter=adapter, compare=True)
    assert shown.startswith("base     fox\nadapter  ")
    with pytest.raises(ValueError, match="compare needs run or adapter"):
        ChatConfig(compare=True)


def test_the_conversation_is_remembered_until_reset(monkeypatch):
    asked = []

    def note(model, tokenizer, messages, config, key):
        asked.append([message["content"] for message in messages])
        if messages[-1]["content"] == "too long":
            raise ValueError("generate: 99 tokens")
        if messages[-1]["content"] == "slow":
            yield "be"
            raise KeyboardInterrupt
        yield from ("a", "b")

    monkeypatch.setattr(chat, "answer", note)
    shown = talk("one", "too long", "slow", "/reset", "two", system="s")
    assert shown == [
        "ab\n",
        "generate: 99 tokens; /reset begins anew\n",
        "be [cut short]\n",
        "forgotten\n",
        "ab\n",
    ]
    assert asked == [
        ["s", "one"],
        ["s", "one", "ab", "too long"],
        ["s", "one", "ab", "slow"],
        ["s", "two"],
    ]


def test_switching_off_keeps_one_copy_and_the_shapes():
    model = from_pretrained(
        assets.demo_model(), experts="reference", lora=LoRAConfig(4, 8.0)
    )
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.LoRAParam))
    others = nnx.state(model, nnx.Not(nnx.LoRAParam))
    switch = AdapterSwitch(model)
    switch.turn(False)
    off = nnx.state(model, nnx.LoRAParam)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(off), strict=True):
        assert (old.shape, old.dtype) == (new.shape, new.dtype)
        assert not np.any(new)
    switch.turn(True)
    on = nnx.state(model, nnx.LoRAParam)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(on), strict=True):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(
        jax.tree.leaves(others),
        jax.tree.leaves(nnx.state(model, nnx.Not(nnx.LoRAParam))),
        strict=True,
    ):
        assert old is new
