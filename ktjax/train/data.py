"""JSONL chats -> token ids with a mask of the tokens to learn.

A line holds either `{"messages": [{"role", "content"}, ...]}` or alpaca's
`{"instruction", "input"?, "output"}`; `"group"` may name a part of an evaluation set.
Whatever is wrong with a line is a `DataError` that begins with `file:line:`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

ROLES = ("system", "user", "assistant", "tool")


class DataError(ValueError):
    """A dataset that cannot be used; the message begins with file:line."""


class ChatTokenizer(Protocol):
    """What training needs of a tokenizer."""

    def encode_chat(
        self, messages: Sequence[dict[str, str]]
    ) -> tuple[list[int], list[bool]]:
        """The ids of a chat, and which of them the assistant wrote."""


@dataclasses.dataclass(frozen=True)
class Chat:
    """One line of a dataset: its messages, where it came from, and its group."""

    messages: tuple[dict[str, str], ...]
    source: str
    group: str = "all"

    @property
    def prompt(self) -> tuple[dict[str, str], ...]:
        """The messages before the last one."""
        return self.messages[:-1]

    @property
    def answer(self) -> str:
        """The content of the last message, the assistant's."""
        return self.messages[-1]["content"]


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised chat: `ids` int32 `[length]`, `learn` bool `[length]`."""

    ids: np.ndarray
    learn: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def read_chats(path: Path) -> list[Chat]:
    """All chats of a JSONL file; empty lines are skipped.

    Raises:
      DataError: an unreadable file, a bad line (named file:line), or no chat at all.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:1: cannot read the dataset: {error}") from None
    chats = []
    # Not splitlines(): JSON strings may hold U+2028 and the like unescaped.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            chats.append(_parse_line(line, f"{path}:{number}"))
    if not chats:
        raise DataError(f"{path}:1: the dataset has no examples")
    return chats


def _parse_line(line: str, source: str) -> Chat:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected a JSON object, got {type(row).__name__}")
    group = row.get("group", "all")
    if not isinstance(group, str):
        raise DataError(f'{source}: "group" must be a string, got {group!r}')
    if "messages" in row:
        messages = _check_messages(row["messages"], source)
    elif "instruction" in row:
        messages = _alpaca_messages(row, source)
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise DataError(
            f'{source}: expected "messages", or "instruction" and "output"; '
            f"got keys: {keys}"
        )
    return Chat(tuple(messages), source, group)


def _check_messages(messages: Any, source: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{source}: "messages" must be a list that is not empty')
    for index, message in enumerate(messages):
        where = f"{source}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{where} must be an object, got {type(message).__name__}")
        if message.get("role") not in ROLES:
            raise DataError(
                f"{where}: role must be one of {', '.join(ROLES)}, "
                f"got {message.get('role')!r}"
            )
        if not isinstance(message.get("content"), str):
            raise DataError(
                f"{where}: content must be a string, got {message.get('content')!r}"
            )
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{source}: the last message must be the assistant's, "
            f"got {messages[-1]['role']!r}"
        )
    if len(messages) == 1:
        raise DataError(f"{source}: expected a message before the assistant's")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _alpaca_messages(row: dict[str, Any], source: str) -> list[dict[str, str]]:
    for key in ("instruction", "output"):
        if not isinstance(row.get(key), str):
            raise DataError(f'{source}: "{key}" must be a string, got {row.get(key)!r}')
    extra = row.get("input", "")
    if not isinstance(extra, str):
        raise DataError(f'{source}: "input" must be a string, got {extra!r}')
    question = f"{row['instruction']}\n\n{extra}" if extra else row["instruction"]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": row["output"]},
    ]


def tokenize(
    chats: Sequence[Chat], tokenizer: ChatTokenizer, longest: int
) -> list[Example]:
    """Token ids and learning masks of `chats`.

    Raises:
      DataError: a chat longer than `longest` tokens, or without a token to learn.
    """
    return [_tokenize_chat(chat, tokenizer.encode_chat, longest) for chat in chats]


def fingerprint(examples: Sequence[Example]) -> str:
    """A hash of all tokens and masks in order, to know a dataset again."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example).to_bytes(8, "little"))
        digest.update(example.ids.tobytes())
        digest.update(example.learn.tobytes())
    return digest.hexdigest()[:16]


def _tokenize_chat(
    chat: Chat,
    encode: Callable[[Sequence[dict[str, str]]], tuple[list[int], list[bool]]],
    longest: int,
) -> Example:
    ids, learn = encode(chat.messages)
    if len(ids) > longest:
        raise DataError(
            f"{chat.source}: the chat has {len(ids)} tokens, more than "
            f"sequence_length = {longest}; shorten it or raise sequence_length"
        )
    # The first token is nobody's target, so it cannot be learnt.
    if not any(learn[1:]):
        raise DataError(f"{chat.source}: the assistant's answer has no token to learn")
    return Example(np.asarray(ids, np.int32), np.asarray(learn, bool))
