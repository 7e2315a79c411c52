"""Write the demo dataset: `python scripts/make_demo_data.py --out DIR`.

Every example is one chat turn of the form "task: word". The base model learns the tasks
of `BASE_TASKS` (see make_demo_model.py) and never sees `NEW_TASK`, which is what the
demo fine-tunes. A tenth of the words is held out: no training set contains them.
"""

from __future__ import annotations

import argparse
import json
import random
import string
import zlib
from collections.abc import Callable
from pathlib import Path

NEXT_LETTER = str.maketrans(
    string.ascii_lowercase, string.ascii_lowercase[1:] + string.ascii_lowercase[0]
)

BASE_TASKS: dict[str, Callable[[str], str]] = {
    "copy": lambda word: word,
    "upper": str.upper,
    "reverse": lambda word: word[::-1],
    "spell": "-".join,
    "double": lambda word: "".join(letter * 2 for letter in word),
    "first": lambda word: word[0],
    "last": lambda word: word[-1],
}
NEW_TASK = "cipher"
TASKS = {**BASE_TASKS, NEW_TASK: lambda word: word.translate(NEXT_LETTER)}

ONSETS = (*"bcdfghjklmnp", "qu", *"rstvwxyz", "st", "tr", "pl", "ch", "sh")
VOWELS = (*"aeiouaeiou", "ea", "oo", "y")
CODAS = ("", "", "", *"bcdfgjklmnpqrstvwxz", "ck", "nt", "rd")
SHORTEST, LONGEST = 3, 8


def make_word(rng: random.Random) -> str:
    """A pronounceable made-up word of 3 to 8 letters; all 26 letters occur."""
    while True:
        word = "".join(
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.randint(1, 3))
        )
        if SHORTEST <= len(word) <= LONGEST:
            return word


def held_out(word: str) -> bool:
    """Whether a word belongs to the evaluation set; decided by the word alone."""
    return zlib.crc32(word.encode()) % 10 == 0


def make_words(rng: random.Random, count: int, *, evaluation: bool) -> list[str]:
    """`count` different words from one side of the held-out split."""
    words: dict[str, None] = {}
    while len(words) < count:
        word = make_word(rng)
        if held_out(word) == evaluation:
            words[word] = None
    return list(words)


def make_example(task: str, word: str) -> dict[str, object]:
    """One line of the dataset: the chat, and the task's name as its group."""
    return {
        "messages": [
            {"role": "user", "content": f"{task}: {word}"},
            {"role": "assistant", "content": TASKS[task](word)},
        ],
        "group": task,
    }


def make_split(
    rng: random.Random, new: int, old: int, *, evaluation: bool
) -> list[dict[str, object]]:
    """`new` examples of the new task and `old` of each base task, shuffled."""
    counts = {NEW_TASK: new} | dict.fromkeys(BASE_TASKS, old)
    examples = [
        make_example(task, word)
        for task, count in counts.items()
        for word in make_words(rng, count, evaluation=evaluation)
    ]
    rng.shuffle(examples)
    return examples


def main() -> None:
    """Write train.jsonl and eval.jsonl."""
    parser = argparse.ArgumentParser(description="Write the demo dataset.")
    parser.add_argument("--out", type=Path, required=True, help="output directory")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)
    splits = {
        # The old tasks are rehearsed a little, so that the adapter adds a skill
        # instead of replacing the old ones.
        "train": make_split(rng, 3000, 150, evaluation=False),
        "eval": make_split(rng, 100, 15, evaluation=True),
    }
    for name, examples in splits.items():
        lines = [json.dumps(example) + "\n" for example in examples]
        (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
