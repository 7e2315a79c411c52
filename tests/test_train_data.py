"""JSONL reading, masks, packing, padding, and the resumable order."""

import json

import numpy as np
import pytest
from train_standin import LetterTokenizer, chat, make_config, make_examples

from ktjax import assets
from ktjax.train.batching import Batcher, BatchStream, Position
from ktjax.train.data import DataError, read_chats, split_chats, tokenize

USER = {"role": "user", "content": "q"}
ASSISTANT = {"role": "assistant", "content": "a"}
GOOD = json.dumps({"messages": [USER, ASSISTANT]})


def test_reads_messages_alpaca_and_unescaped_line_separators(tmp_path):
    path = tmp_path / "data.jsonl"
    alpaca = {
        "instruction": "add",
        "input": "1 2",
        "output": "a\u2028b",
        "group": "sum",
    }
    lines = [GOOD, "", json.dumps(alpaca, ensure_ascii=False)]
    path.write_text("\n".join(lines), encoding="utf-8")
    first, second = read_chats(path)
    assert first.messages == (USER, ASSISTANT)
    assert first.group == "all"
    assert second.prompt == ({"role": "user", "content": "add\n\n1 2"},)
    assert (second.answer, second.group) == ("a\u2028b", "sum")
    assert second.source == f"{path}:3"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"text": "x"}', "got keys: text"),
        ('{"messages": []}', "must be a list that is not empty"),
        (json.dumps({"messages": [USER, "x"]}), "messages[1] must be an object"),
        (json.dumps({"messages": [USER]}), "the last message must be the assistant's"),
        (json.dumps({"messages": [ASSISTANT]}), "a message before the assistant's"),
        (
            json.dumps({"messages": [{"role": "bot", "content": ""}]}),
            "messages[0]: role must be one of system, user, assistant, tool, got 'bot'",
        ),
        (
            json.dumps({"messages": [{"role": "user", "content": 3}]}),
            "messages[0]: content must be a string, got 3",
        ),
        ('{"instruction": "x"}', '"output" must be a string, got None'),
        ('{"instruction": "x", "output": "y", "input": 1}', '"input" must be a string'),
        ('{"instruction": "x", "output": "y", "group": 1}', '"group" must be a string'),
        ('{"prompt": "x"}', "must be two strings or two lists of messages"),
        (json.dumps({"prompt": [USER], "completion": "x"}), "or two lists of messages"),
        (json.dumps({"prompt": [], "completion": [ASSISTANT]}), '"prompt" must be a'),
        (json.dumps({"prompt": [USER], "completion": [3]}), "completion[0] must be an"),
        (
            json.dumps({"prompt": [USER], "completion": [USER]}),
            "the last message must be the assistant's",
        ),
    ],
)
def test_bad_line_names_file_and_line(tmp_path, line, words):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_chats(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert words in str(caught.value)


def test_reads_prompts_and_completions(tmp_path):
    path = tmp_path / "data.jsonl"
    system = {"role": "system", "content": "s"}
    rows = [
        {"prompt": "q", "completion": "a", "group": "g"},
        {"prompt": [system, USER], "completion": [ASSISTANT]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = read_chats(path)
    assert first.messages == (USER, ASSISTANT)
    assert first.group == "g"
    assert second.messages == (system, USER, ASSISTANT)


def test_split_is_a_function_of_the_seed():
    chats = [chat("a" * (index + 1), "b") for index in range(20)]
    rest, taken = split_chats(chats, 0.25, seed=3)
    assert len(taken) == 5
    assert sorted([*rest, *taken], key=lambda c: len(c.prompt[0]["content"])) == chats
    for part in (rest, taken):  # the file's order stays
        assert [c for c in chats if c in part] == part
    assert split_chats(chats, 0.25, seed=3) == (rest, taken)
    assert split_chats(chats, 0.25, seed=4) != (rest, taken)
    for share in (1e-9, 0.9999):
        assert all(split_chats(chats, share, seed=0))
    with pytest.raises(DataError, match="needs at least two chats, got 1"):
        split_chats(chats[:1], 0.5, seed=0)


@pytest.mark.parametrize("content", [None, "", "\n\n", b"\xff\xfe"])
def test_unusable_file(tmp_path, content):
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=f"{path}:1: "):
        read_chats(path)


def test_tokenize_masks_and_limits():
    (example,) = tokenize([chat("ab", "cd")], LetterTokenizer(), 8)
    assert example.ids.tolist() == [28, 0, 1, 31, 29, 2, 3, 31]
    assert example.learn.tolist() == [False] * 5 + [True] * 3
    with pytest.raises(DataError, match="test: the chat has 8 tokens, more than"):
        tokenize([chat("ab", "cd")], LetterTokenizer(), 7)


def unpack(batch):
    """The (inputs, targets, weights) of every chat in a batch."""
    for row in range(len(batch.input_ids)):
        for segment in range(1, batch.segment_ids[row].max() + 1):
            at = batch.segment_ids[row] == segment
            assert batch.positions[row, at].tolist() == list(range(at.sum()))
            yield tuple(
                tuple(array[row, at].tolist())
                for array in (batch.input_ids, batch.targets, batch.weights)
            )


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_every_chat_occurs_once_and_whole(batching):
    examples = make_examples(50)
    config = make_config(batching=batching)
    batches = list(Batcher.from_config(config, 4).once(examples))
    wanted = sorted(
        (
            tuple(e.ids[:-1].tolist()),
            tuple(e.ids[1:].tolist()),
            tuple(e.learn[1:].astype(float).tolist()),
        )
        for e in examples
    )
    assert sorted(seen for batch in batches for seen in unpack(batch)) == wanted
    shapes = {batch.input_ids.shape for batch in batches}
    assert shapes == ({(4, 16)} if batching == "pack" else {(4, 8), (4, 16)})
    for batch in batches:
        assert not batch.weights[batch.segment_ids == 0].any()
        if batching == "pad":
            assert batch.segment_ids.max() == 1


def test_packing_wastes_little():
    examples = make_examples(400)
    (length, rows) = (64, 4)
    batches = list(Batcher("pack", rows, length, 1).once(examples))
    used = sum(np.count_nonzero(batch.segment_ids) for batch in batches[:-1])
    assert used / ((len(batches) - 1) * rows * length) > 0.9


@pytest.mark.parametrize("batching", ["pack", "pad"])
def test_stream_resumes_and_shuffles(batching):
    examples = make_examples(30)
    batcher = Batcher.from_config(make_config(batching=batching), 4)
    stream = BatchStream(examples, batcher, seed=3)
    batches, positions = [], []
    while stream.position.epoch < 3:
        positions.append(stream.position)
        batches.append(stream.next())
    for start in (0, 1, len(batches) // 2, len(batches) - 1):
        resumed = BatchStream(examples, batcher, seed=3, position=positions[start])
        for batch in batches[start:]:
            for old, new in zip(batch, resumed.next(), strict=True):
                np.testing.assert_array_equal(old, new)
    other = BatchStream(examples, batcher, seed=4).next()
    assert not np.array_equal(other.input_ids, batches[0].input_ids)
    second = BatchStream(examples, batcher, 3, Position(1, 0)).next()
    assert not np.array_equal(second.input_ids, batches[0].input_ids)


def test_demo_data():
    train = read_chats(assets.demo_data("train"))
    evaluation = read_chats(assets.demo_data("eval"))
    assert {chat.group for chat in train} == {chat.group for chat in evaluation}
    assert not {c.prompt[0]["content"] for c in train} & {
        c.prompt[0]["content"] for c in evaluation
    }
    with pytest.raises(ValueError, match="got 'test'"):
        assets.demo_data("test")
