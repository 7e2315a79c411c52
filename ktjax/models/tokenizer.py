"""Text and chats <-> token ids, from a Hugging Face directory or beside a GGUF file."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders

from ktjax.io.gguf import GGUFCheckpoint, is_gguf
from ktjax.models.chat_template import ChatTemplate, ChatTemplateError, Message

# Special tokens, and what they are called in the keys of GGUF.
_SPECIAL = {
    "bos_token": "bos",
    "eos_token": "eos",
    "pad_token": "padding",
    "unk_token": "unknown",
}


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or does not fit what is asked of it."""


class Tokenizer:
    """tokenizer.json and the chat template beside it.

    Attributes:
      eos_id: the token that ends an answer, or None.
      pad_id: the padding token, or None.
      vocab_size: number of tokens, added ones included.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Load from the directory `path`, or that of the GGUF file `path`.

        Reads tokenizer.json, and, where they are there, tokenizer_config.json and
        chat_template.jinja. Of a GGUF file, what it says of special tokens and the chat
        template counts where these do not.

        Raises:
          FileNotFoundError: there is no tokenizer.json.
          TokenizerError: a file is broken.
          CheckpointError: the GGUF file is damaged.
        """
        directory, hint = Path(path), "expected a tokenizer there"
        config: dict[str, Any] = {}
        if is_gguf(path):
            hint = (
                "the tokenizer inside of a GGUF file is not read: put tokenizer.json "
                "from the model's Hugging Face repository beside it"
            )
            config = _gguf_config(GGUFCheckpoint(path))
            directory = directory if directory.is_dir() else directory.parent
        file = directory / "tokenizer.json"
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; {hint}")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise TokenizerError(f"{file}: not a tokenizer: {error}") from None
        config |= _read_config(directory / "tokenizer_config.json")
        special = {
            name: token
            for name in _SPECIAL
            if (token := _token_text(config.get(name))) is not None
        }
        self.vocab_size: int = self._tokenizer.get_vocab_size()
        self.eos_id = self._id_of(special.get("eos_token"))
        self.pad_id = self._id_of(special.get("pad_token"))
        self._template = _load_template(directory, config, special)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; nothing is added in front or behind."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special_tokens
        )

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as tokens come; a piece never ends inside a character."""
        stream = decoders.DecodeStream(skip_special_tokens=True)
        for token in ids:
            piece = stream.step(self._tokenizer, token)
            if piece:
                yield piece

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> list[int]:
        """The ids of a chat, with the start of the assistant's answer if asked.

        Raises:
          TokenizerError: there is no chat template.
          ChatTemplateError: the template refuses the messages.
        """
        text = self._chat_template().render(
            messages, add_generation_prompt=add_generation_prompt
        )
        return self.encode(text)

    def encode_chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and which of them the assistant wrote.

        A written token lies wholly in what the assistant wrote, up to and with the
        token that ends the answer: the line break that templates put after it is not
        learnt, since generation stops before it.

        Raises:
          TokenizerError: there is no chat template, or a token reaches across the start
            of an answer (then generating would not see the same tokens).
          ChatTemplateError: the template refuses the messages.
        """
        text, spans = self._chat_template().render_with_spans(messages)
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        ids, offsets = encoding.ids, encoding.offsets
        mask = [False] * len(ids)
        starts = [start for start, _ in offsets]
        for start, stop in spans:
            first = bisect.bisect_left(starts, start)
            if first and offsets[first - 1][1] > start:
                raise TokenizerError(
                    f"token {ids[first - 1]} reaches across the start of an answer at "
                    f"character {start}; end the generation prompt of the chat "
                    "template with a special token"
                )
            inside = [
                index
                for index in range(first, len(ids))
                if offsets[index][1] <= stop and starts[index] < stop
            ]
            ends = [index for index in inside if ids[index] == self.eos_id]
            for index in inside:
                mask[index] = not ends or index <= ends[-1]
        return ids, mask

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise TokenizerError(
                "this tokenizer has no chat template; add chat_template.jinja beside "
                "tokenizer.json, or chat_template to tokenizer_config.json"
            )
        return self._template

    def _id_of(self, token: str | None) -> int | None:
        return None if token is None else self._tokenizer.token_to_id(token)


def _read_config(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TokenizerError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict):
        raise TokenizerError(f"{file}: expected a JSON object")
    return config


def _gguf_config(checkpoint: GGUFCheckpoint) -> dict[str, Any]:
    """What a GGUF file says of that which tokenizer_config.json does."""
    metadata = checkpoint.metadata
    tokens = metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    config: dict[str, Any] = {}
    for name, key in _SPECIAL.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if isinstance(token, int) and 0 <= token < len(tokens):
            config[name] = tokens[token]
    template = metadata.get("tokenizer.chat_template")
    return config | ({"chat_template": template} if template else {})


def _token_text(value: Any) -> str | None:
    """A special token is a string, or an object that describes one."""
    return value.get("content") if isinstance(value, dict) else value


def _load_template(
    directory: Path, config: dict[str, Any], special: dict[str, str]
) -> ChatTemplate | None:
    file = directory / "chat_template.jinja"
    source: Any
    if file.is_file():
        source = file.read_text(encoding="utf-8")
    else:
        source = config.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {entry.get("name"): entry.get("template") for entry in source}
            source = named.get("default")
    if source is None:
        return None
    try:
        return ChatTemplate(source, special)
    except ChatTemplateError as error:
        raise ChatTemplateError(f"{directory}: {error}") from None
