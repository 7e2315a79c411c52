"""JSONL chats -> token ids with a mask of the tokens to learn.

For fine-tuning a line holds `{"messages": [{"role", "content"}, ...]}`, alpaca's
`{"instruction", "input"?, "output"}`, or `{"prompt", "completion"}`, both text or both
messages. For preferences it holds `{"prompt", "chosen", "rejected"}`, or the last two
as whole chats. `"group"` may name a part of an evaluation set.
Whatever is wrong with a line is a `DataError` that begins with `file:line:`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

# Tells the random numbers of `split_chats` from others of the same seed.
_SPLIT = 0x73706C6974

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
    """One line of a dataset: its messages, where it came from, and its group.

    Of a preference, `messages` are the chat with the chosen answer and `rejected` the
    one with the other.
    """

    messages: tuple[dict[str, str], ...]
    source: str
    group: str = "all"
    rejected: tuple[dict[str, str], ...] | None = None

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
    """One tokenised chat: `ids` int32 `[length]`, `learn` bool `[length]`.

    Of a preference, `rejected` is the chat with the other answer.
    """

    ids: np.ndarray
    learn: np.ndarray
    rejected: Example | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def parts(self) -> tuple[Example, ...]:
        """The chats in it: one, or the chosen and the rejected."""
        return (self,) if self.rejected is None else (self, self.rejected)


def read_chats(path: Path, *, preferences: bool = False) -> list[Chat]:
    """All chats of a JSONL file; empty lines are skipped.

    Args:
      path: the file.
      preferences: whether every line has a chosen and a rejected answer; else none may.

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
            chats.append(_parse_line(line, f"{path}:{number}", preferences))
    if not chats:
        raise DataError(f"{path}:1: the dataset has no examples")
    return chats


def _parse_line(line: str, source: str, preferences: bool) -> Chat:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{source}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{source}: expected a JSON object, got {type(row).__name__}")
    group = row.get("group", "all")
    if not isinstance(group, str):
        raise DataError(f'{source}: "group" must be a string, got {group!r}')
    if preferences:
        chosen, rejected = _preference(row, source)
        return Chat(tuple(chosen), source, group, tuple(rejected))
    if "messages" in row:
        messages = _check_messages(row["messages"], source)
    elif "instruction" in row:
        messages = _alpaca_messages(row, source)
    elif "prompt" in row:
        messages = _completed(row, "completion", source)
    else:
        keys = ", ".join(sorted(row)) or "none"
        raise DataError(
            f'{source}: expected "messages", "instruction" and "output", or "prompt" '
            f'and "completion"; got keys: {keys}'
        )
    return Chat(tuple(messages), source, group)


def _check_messages(messages: Any, source: str) -> list[dict[str, str]]:
    messages = _messages(messages, "messages", source)
    _check_turns(messages, source)
    return messages


def _messages(messages: Any, key: str, source: str) -> list[dict[str, str]]:
    """The messages under `key` of a row, each with a known role and text."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{source}: "{key}" must be a list that is not empty')
    for index, message in enumerate(messages):
        where = f"{source}: {key}[{index}]"
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
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def _check_turns(messages: Sequence[dict[str, str]], source: str) -> None:
    """Whether the assistant has the last word, and not the only one."""
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{source}: the last message must be the assistant's, "
            f"got {messages[-1]['role']!r}"
        )
    if len(messages) == 1:
        raise DataError(f"{source}: expected a message before the assistant's")


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


def _completed(row: dict[str, Any], key: str, source: str) -> list[dict[str, str]]:
    """The prompt, and what comes after it under `key`: both text or both messages."""
    messages: list[dict[str, str]] = []
    kinds = {type(row.get(name)) for name in ("prompt", key)}
    for name, role in (("prompt", "user"), (key, "assistant")):
        value = row.get(name)
        if kinds == {str}:
            messages.append({"role": role, "content": str(value)})
        elif kinds == {list}:
            messages += _messages(value, name, source)
        else:
            raise DataError(
                f'{source}: "prompt" and "{key}" must be two strings or two lists of '
                f"messages, got {row['prompt']!r} and {row.get(key)!r}"
            )
    _check_turns(messages, source)
    return messages


def _preference(
    row: dict[str, Any], source: str
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The chats with the chosen and with the rejected answer to one prompt."""
    for key in ("chosen", "rejected"):
        if key not in row:
            keys = ", ".join(sorted(row)) or "none"
            raise DataError(
                f'{source}: a preference needs "{key}" (objective dpo); got keys: '
                f"{keys}"
            )
    if "prompt" in row:
        chosen, rejected = (_completed(row, k, source) for k in ("chosen", "rejected"))
    else:
        chosen, rejected = (
            _messages(row[k], k, source) for k in ("chosen", "rejected")
        )
        _check_turns(chosen, source)
        _check_turns(rejected, source)
        if chosen[:-1] != rejected[:-1]:
            raise DataError(
                f'{source}: "chosen" and "rejected" must differ in the last message '
                "only"
            )
    if chosen == rejected:
        raise DataError(f'{source}: "chosen" and "rejected" are the same')
    return chosen, rejected


def split_chats(
    chats: Sequence[Chat], share: float, seed: int
) -> tuple[list[Chat], list[Chat]]:
    """Set a share of the chats aside: (the rest, those), each in the order of `chats`.

    Which ones is a function of their number, the share and the seed.

    Args:
      chats: at least two.
      share: above 0 and below 1; at least one chat is taken and one left.
      seed: at least 0.

    Raises:
      DataError: there are not two chats.
    """
    if len(chats) < 2:
        raise DataError(
            f"{chats[0].source}: eval_split needs at least two chats, got {len(chats)}"
        )
    count = min(max(round(len(chats) * share), 1), len(chats) - 1)
    # A stream of its own: the order of the training data has [seed, epoch].
    generator = np.random.Generator(np.random.PCG64([seed, 0, _SPLIT]))
    taken = set(generator.permutation(len(chats))[:count].tolist())
    rest = [chat for index, chat in enumerate(chats) if index not in taken]
    return rest, [chats[index] for index in sorted(taken)]


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
    for part in (part for example in examples for part in example.parts):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part.ids.tobytes())
        digest.update(part.learn.tobytes())
    return digest.hexdigest()[:16]


def fingerprint_arrays(tree: Any) -> str:
    """A hash of all arrays of a pytree, to know them again."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf, order="C").tobytes())
    return digest.hexdigest()[:16]


def _tokenize_chat(
    chat: Chat,
    encode: Callable[[Sequence[dict[str, str]]], tuple[list[int], list[bool]]],
    longest: int,
) -> Example:
    example = _encode(chat.messages, chat.source, encode)
    what = "chat has"
    if chat.rejected is not None:
        rejected = _encode(chat.rejected, chat.source, encode)
        example = dataclasses.replace(example, rejected=rejected)
        what = "two chats of the preference have"
    length = sum(map(len, example.parts))
    if length > longest:
        raise DataError(
            f"{chat.source}: the {what} {length} tokens, more than "
            f"sequence_length = {longest}; shorten it or raise sequence_length"
        )
    return example


def _encode(
    messages: Sequence[dict[str, str]],
    source: str,
    encode: Callable[[Sequence[dict[str, str]]], tuple[list[int], list[bool]]],
) -> Example:
    ids, learn = encode(messages)
    # The first token is nobody's target, so it cannot be learnt.
    if not any(learn[1:]):
        raise DataError(f"{source}: the assistant's answer has no token to learn")
    return Example(np.asarray(ids, np.int32), np.asarray(learn, bool))
