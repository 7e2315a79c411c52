"""Chat templates: messages -> text, and which characters the assistant wrote."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, Any]
Span = tuple[int, int]

# Noncharacters of Unicode: no text may hold them, so they can mark what a template's
# {% generation %} blocks produced.
_START, _STOP = "\ufdd0", "\ufdd1"


class ChatTemplateError(ValueError):
    """A chat template that is broken, or refuses the messages."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's own text."""

    tags = {"generation"}  # noqa: RUF012 - the base class's protocol

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Turn the block into a call that wraps its text in marks."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_START}{caller()}{_STOP}"


class ChatTemplate:
    """A compiled Hugging Face chat template."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Compile `source`.

        Args:
          source: the Jinja template.
          variables: what it may use beside the messages, such as eos_token.

        Raises:
          ChatTemplateError: it does not compile.
        """
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(
                f"the chat template does not compile: {error}"
            ) from None
        self._variables = dict(variables)

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> str:
        """The text of `messages`, with the start of the assistant's answer if asked.

        Raises:
          ChatTemplateError: the template refuses the messages.
        """
        marked = self._render(messages, add_generation_prompt)
        return marked.replace(_START, "").replace(_STOP, "")

    def render_with_spans(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of `messages`, and the character ranges that the assistant wrote.

        The ranges are those of the template's `{% generation %}` blocks if it has any.
        Otherwise they are found by rendering: an answer begins where the text of the
        messages before it, with the generation prompt, ends; and takes what adding the
        answer adds.

        Raises:
          ChatTemplateError: an answer cannot be found in the text.
        """
        marked = self._render(messages, False)
        if _START in marked:
            return _unmark(marked)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                spans.append(self._find_answer(marked, messages, index))
        return marked, spans

    def _find_answer(self, text: str, messages: Sequence[Message], index: int) -> Span:
        before = self.render(messages[:index], add_generation_prompt=True)
        after = self.render(messages[: index + 1])
        if text.startswith(before) and after.startswith(before):
            start, turn = len(before), after[len(before) :]
            if text.startswith(turn, start):
                return start, start + len(turn)
            # Some templates give the last answer an empty thinking block that earlier
            # ones lack: then the answer proper and what ends it must still match.
            content = str(messages[index]["content"]).strip()
            turn = turn[turn.rfind(content) :] if content in turn else ""
            if turn and text.startswith(turn, start):
                return start, start + len(turn)
        raise ChatTemplateError(
            f"cannot tell which text messages[{index}] produced: the template renders "
            "it differently in its context; mark the answers in the template with "
            "{% generation %}"
        )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        for index, message in enumerate(messages):
            content = message.get("content")
            if isinstance(content, str) and (_START in content or _STOP in content):
                raise ChatTemplateError(
                    f"messages[{index}] holds U+FDD0 or U+FDD1, which are no "
                    "characters; remove them"
                )
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(
                f"the chat template failed on these messages: {error}"
            ) from None


def _unmark(marked: str) -> tuple[str, list[Span]]:
    pieces: list[str] = []
    spans: list[Span] = []
    length = 0
    for number, piece in enumerate(marked.split(_START)):
        inside, stop, outside = piece.rpartition(_STOP)
        if number and not stop:
            raise ChatTemplateError("{% generation %} blocks must not be nested")
        if number:
            spans.append((length, length + len(inside)))
        pieces.append(inside + outside)
        length += len(pieces[-1])
    return "".join(pieces), spans


def _to_json(value: Any, **kwargs: Any) -> str:
    # Jinja's own tojson escapes HTML, which no chat template wants.
    return json.dumps(value, ensure_ascii=False, **kwargs)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)
