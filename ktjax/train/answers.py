"""Generated answers to evaluation chats, compared exactly with the wanted ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from ktjax.train.data import Chat

Answerer = Callable[[Sequence[Sequence[dict[str, str]]]], list[str]]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What the model answered to the prompt of a chat."""

    chat: Chat
    text: str

    @property
    def right(self) -> bool:
        """Whether it is, to the letter, the wanted answer."""
        return self.text.strip() == self.chat.answer.strip()


def answer_chats(chats: Sequence[Chat], answer: Answerer, batch: int) -> list[Answer]:
    """Answer the prompts of `chats`, `batch` at a time.

    Args:
      chats: chats whose last message is the wanted answer.
      answer: conversations -> the assistant's next message to each.
      batch: prompts given to `answer` at once.
    """
    answers: list[Answer] = []
    for start in range(0, len(chats), batch):
        part = chats[start : start + batch]
        texts = answer([chat.prompt for chat in part])
        answers += [Answer(*pair) for pair in zip(part, texts, strict=True)]
    return answers
