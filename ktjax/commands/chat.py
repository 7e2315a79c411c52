"""A conversation with a model on the terminal, with and without its adapter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from rich.console import Console

from ktjax.commands.config import ChatConfig
from ktjax.commands.generate import answer, open_model, system_messages
from ktjax.models import Decoder, Tokenizer

HELP = """/reset          forget the conversation
/adapter on     answer with the adapter
/adapter off    answer as the base model
/compare        answer twice, without and with it; again to stop
/help           this
/exit           leave, as does Ctrl-D; Ctrl-C cuts an answer short"""


def run_chat(
    config: ChatConfig, console: Console, read: Callable[[str], str] = input
) -> None:
    """Talk until the end of the input.

    Args:
      config: see `ChatConfig`.
      console: where answers go, as they come.
      read: shows a prompt and returns a line, or raises EOFError.

    Raises:
      AdapterError, CheckpointError, ConfigError, TokenizerError, ValueError,
      FileNotFoundError: the model cannot be loaded.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives `input` a history and editing keys)
    with contextlib.ExitStack() as stack:
        with console.status("loading"):
            model, tokenizer = stack.enter_context(open_model(config))
        chat = _Chat(config, model, tokenizer, console)
        console.print("/help says what there is beside talking", style="dim")
        for line in _lines(read):
            if not chat.take(line):
                return


class AdapterSwitch:
    """Turns a model's adapters off and on; of the base weights there is one copy."""

    def __init__(self, model: Decoder):
        self._model = model
        # Variables of its own: those of `nnx.state` are the model's.
        self._adapters = jax.tree.map(lambda a: a, nnx.state(model, nnx.LoRAParam))
        self.exists = bool(jax.tree.leaves(self._adapters))
        self.on = self.exists

    def turn(self, on: bool) -> None:
        """Put the adapters in, or zeros of their shape, so that nothing recompiles."""
        state = self._adapters
        if not on:
            state = jax.tree.map(jnp.zeros_like, state)
        nnx.update(self._model, state)
        self.on = on


class _Chat:
    """The conversation so far, and what the next line does."""

    def __init__(
        self,
        config: ChatConfig,
        model: Decoder,
        tokenizer: Tokenizer,
        console: Console,
    ):
        self._config, self._model, self._tokenizer = config, model, tokenizer
        self._console = console
        self._adapter = AdapterSwitch(model)
        self._compare = config.compare
        self._key = jax.random.key(config.seed)
        self._messages = system_messages(config)

    def take(self, line: str) -> bool:
        """Obey or answer one line; False ends the conversation."""
        if line in ("/exit", "/quit"):
            return False
        if line.startswith("/"):
            self._obey(line)
        elif line:
            self._reply(line)
        return True

    def _obey(self, line: str) -> None:
        match line.split():
            case ["/reset"]:
                self._messages = system_messages(self._config)
                self._say("forgotten")
            case ["/adapter" | "/compare", *_] if not self._adapter.exists:
                self._say("there is no adapter; start with --run or --adapter")
            case ["/adapter", "on" | "off" as state]:
                self._adapter.turn(state == "on")
                self._say(f"the adapter is {state}")
            case ["/compare"]:
                self._compare = not self._compare
                self._say(f"comparing is {'on' if self._compare else 'off'}")
            case ["/help"]:
                self._say(HELP)
            case _:
                self._say(f"{line} is no command; /help lists them")

    def _reply(self, line: str) -> None:
        """Answer, and remember both; what cannot be answered is not remembered."""
        messages = [*self._messages, {"role": "user", "content": line}]
        self._key, key = jax.random.split(self._key)
        try:
            if self._compare:
                before = self._adapter.on
                self._adapter.turn(False)
                self._stream("base     ", messages, key)
                self._adapter.turn(True)
                text = self._stream("adapter  ", messages, key)
                self._adapter.turn(before)
            else:
                text = self._stream("", messages, key)
        except ValueError as error:
            self._say(f"{error}; /reset begins anew")
            return
        self._messages = [*messages, {"role": "assistant", "content": text}]

    def _stream(self, name: str, messages: list[dict[str, str]], key: jax.Array) -> str:
        """Show the answer piece by piece and return it; Ctrl-C cuts it short."""
        pieces: list[str] = []
        self._console.print(name, style="bold", end="")
        try:
            for piece in answer(
                self._model, self._tokenizer, messages, self._config, key
            ):
                self._console.out(piece, end="", highlight=False)
                pieces.append(piece)
        except KeyboardInterrupt:
            self._console.out(" [cut short]", end="")
        self._console.out("")
        return "".join(pieces)

    def _say(self, text: str) -> None:
        self._console.print(text, style="dim", highlight=False, markup=False)


def _lines(read: Callable[[str], str]) -> Iterator[str]:
    while True:
        try:
            yield read("> ").strip()
        except EOFError:
            return
