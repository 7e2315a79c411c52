"""The tokenizer, chat templates and the mask of the assistant's tokens."""

from __future__ import annotations

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ktjax.models import Tokenizer as ChatTokenizer
from ktjax.models import TokenizerError
from ktjax.models.chat_template import ChatTemplate, ChatTemplateError

SPECIAL = ["<pad>", "<|im_start|>", "<|im_end|>"]

# The shape of Qwen's templates: roles, an end token, then a line break.
CHATML = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# Qwen3 gives only the last answer a thinking block.
THINKING = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.role == 'assistant' and loop.last %}{{- '<think></think>' }}"
    "{%- endif %}"
    "{{- message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MARKED = (
    "{% for message in messages %}{{ message.role }}:"
    "{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello\nyou"},
    {"role": "user", "content": "hello\nyou"},
    {"role": "assistant", "content": "bye"},
]


def write(path, template=None, **config):
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocab = {token: index for index, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<pad>"}, **config}
    if template is not None:
        config["chat_template"] = template
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def learnt(tokenizer, messages):
    """The text of each run of learnt tokens."""
    ids, mask = tokenizer.encode_chat(messages)
    assert len(ids) == len(mask)
    assert ids == tokenizer.apply_chat_template(messages)
    runs: list[list[int]] = []
    for index, mine in enumerate(mask):
        if mine and (index == 0 or not mask[index - 1]):
            runs.append([])
        if mine:
            runs[-1].append(ids[index])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


@pytest.mark.parametrize(
    ("template", "last"),
    [
        (CHATML, "bye<|im_end|>"),
        (THINKING, "<think></think>bye<|im_end|>"),
        (MARKED, "bye<|im_end|>"),
    ],
)
def test_assistant_tokens(tmp_path, template, last):
    tokenizer = ChatTokenizer(write(tmp_path, template))
    assert learnt(tokenizer, CHAT) == ["hello\nyou<|im_end|>", last]
    assert learnt(tokenizer, CHAT[:2]) == []


def test_generation_prompt_is_a_prefix_of_the_answered_chat(tmp_path):
    tokenizer = ChatTokenizer(write(tmp_path, CHATML))
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)
    ids, mask = tokenizer.encode_chat(CHAT[:3])
    assert ids[: len(prompt)] == prompt
    assert mask.index(True) == len(prompt)


def test_encode_and_decode(tmp_path):
    tokenizer = ChatTokenizer(write(tmp_path, CHATML))
    ids = tokenizer.encode("a<|im_end|>b")
    assert len(ids) == 3
    assert tokenizer.eos_id == ids[1]
    assert tokenizer.pad_id == 0
    assert tokenizer.vocab_size == len(SPECIAL) + 96
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "a<|im_end|>b"
    assert "".join(tokenizer.decode_stream(ids)) == "ab"
    assert list(tokenizer.decode_stream([])) == []


def test_streamed_pieces_are_whole_characters(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = ChatTokenizer(tmp_path)
    ids = tokenizer.encode("aé日")
    assert len(ids) == 6
    assert list(tokenizer.decode_stream(ids)) == ["a", "é", "日"]


def test_template_beside_the_tokenizer_wins(tmp_path):
    write(tmp_path, CHATML)
    (tmp_path / "chat_template.jinja").write_text("only {{ messages[0].content }}")
    tokenizer = ChatTokenizer(tmp_path)
    ids = tokenizer.apply_chat_template(CHAT)
    assert tokenizer.decode(ids) == "only be kind"
    write(
        tmp_path, [{"name": "default", "template": "D"}, {"name": "b", "template": ""}]
    )
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTokenizer(tmp_path).apply_chat_template(CHAT) == tokenizer.encode("D")


def test_template_variables_and_functions():
    template = ChatTemplate(
        "{{ eos_token }}{{ messages | tojson }}{{ strftime_now('%Y') | length }}",
        {"eos_token": "E"},
    )
    assert template.render([{"role": "é<"}]) == 'E[{"role": "é<"}]4'


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        ChatTokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        ChatTokenizer(tmp_path)
    tokenizer = ChatTokenizer(write(tmp_path))
    with pytest.raises(TokenizerError, match="has no chat template"):
        tokenizer.encode_chat(CHAT)
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTokenizer(write(tmp_path, "{% for %}"))
    refusing = ChatTemplate("{{ raise_exception('no system role') }}", {})
    with pytest.raises(ChatTemplateError, match="no system role"):
        refusing.render(CHAT)
    with pytest.raises(ChatTemplateError, match="are no characters"):
        ChatTemplate(MARKED, {}).render([{"role": "user", "content": "\ufdd0"}])
    counting = ChatTemplate("{{ messages | length }}", {})
    with pytest.raises(ChatTemplateError, match=r"which text messages\[2\] produced"):
        counting.render_with_spans(CHAT)
    with pytest.raises(ChatTemplateError, match="must not be nested"):
        ChatTemplate(
            "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
            {},
        ).render_with_spans(CHAT)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        ChatTokenizer(tmp_path)


def test_a_token_across_the_start_of_an_answer_is_an_error(tmp_path):
    vocab = {" ": 0, "a": 1, "b": 2, ":": 3, ":b": 4}
    raw = Tokenizer(models.BPE(vocab, [(":", "b")]))
    raw.save(str(tmp_path / "tokenizer.json"))
    template = (
        "{% for m in messages %}{{ m.content }}{{ ':' if loop.first }}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    tokenizer = ChatTokenizer(tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    assert tokenizer.encode_chat(chat) == ([1, 3, 1], [False, False, True])
    chat[1]["content"] = "b"
    with pytest.raises(TokenizerError, match="reaches across the start of an answer"):
        tokenizer.encode_chat(chat)


def test_rendering_equals_transformers(tmp_path):
    """Rendering must be the one that transformers does, trimming of blocks included."""
    transformers = pytest.importorskip("transformers")
    template = (
        "{% if messages %}\n  {% for m in messages %}\n{{ m.content }}\n"
        "  {% if loop.index == 3 %}\n{% break %}\n  {% endif %}\n"
        "  {% endfor %}\n{% endif %}"
    )
    for source in (CHATML, THINKING, MARKED, template):
        write(
            tmp_path,
            source,
            tokenizer_class="PreTrainedTokenizerFast",
            pad_token="<pad>",
        )
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        ours = ChatTokenizer(tmp_path)
        for prompt in (False, True):
            want = theirs.apply_chat_template(
                CHAT, add_generation_prompt=prompt, tokenize=False
            )
            got = ours.apply_chat_template(CHAT, add_generation_prompt=prompt)
            assert got == ours.encode(want)
