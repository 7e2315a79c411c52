"""Trainings that are killed at random moments, or whose disk is full, lose nothing."""

import json
import random
import signal
import time

import pytest
import train_process

from ktjax.train import checkpoint
from ktjax.train.checkpoint import list_checkpoints

KILLS = 20


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a training leaves that nothing happens to."""
    directory = tmp_path_factory.mktemp("whole")
    process = train_process.start(directory)
    process.join(120)
    assert process.exitcode == 0
    return directory


def lines(directory):
    """metrics.jsonl but for the times."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").open()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def assert_same_run(one, two):
    assert lines(one) == lines(two)
    first, second = (list_checkpoints(path / "checkpoints") for path in (one, two))
    assert [step for step, _ in first] == [step for step, _ in second]
    for (_, left), (_, right) in zip(first, second, strict=True):
        for file in left.iterdir():
            assert file.read_bytes() == (right / file.name).read_bytes(), file.name


def newest(root):
    """The step of the newest checkpoint, 0 without one."""
    return max((step for step, _ in list_checkpoints(root)), default=0)


def wait_for_a_step(root, process):
    """Until the process has saved a checkpoint."""
    before = newest(root)
    while process.is_alive() and newest(root) == before:
        time.sleep(0.002)


def test_killed_at_random_moments_and_resumed_is_bit_exact(tmp_path, whole):
    moments = random.Random(0)
    root = tmp_path / "checkpoints"
    steps = []
    for kill in range(KILLS):
        process = train_process.start(tmp_path)
        if kill % 4:
            # In the midst of steps, evaluations and checkpoints.
            wait_for_a_step(root, process)
            time.sleep(moments.uniform(0, 0.05))
        else:
            # While it starts, compiles and reads its checkpoint.
            time.sleep(moments.uniform(0, 0.4))
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, "it ended before it was killed"
        for step, path in list_checkpoints(root):  # each complete
            assert checkpoint.read_meta(path)["step"] == step
        steps.append(newest(root))
    # Nothing that was saved got lost, and the kills were spread over the training.
    assert steps == sorted(steps)
    assert len(set(steps)) > KILLS / 2
    last = train_process.start(tmp_path)
    last.join(120)
    assert last.exitcode == 0
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize("metrics_only", [False, True])
def test_a_full_disk_is_an_error_and_loses_nothing(tmp_path, whole, metrics_only):
    ours, theirs = train_process.CONTEXT.Pipe()
    process = train_process.CONTEXT.Process(
        target=train_process.run_out_of_space, args=(tmp_path, metrics_only, theirs)
    )
    process.start()
    assert ours.poll(60)
    kind, message = ours.recv()
    process.join(60)
    assert kind == "TrainingError"
    root = tmp_path / "checkpoints"
    what = "metrics.jsonl" if metrics_only else f"checkpoint {root / 'step-00000004'}"
    for words in (
        "step 4: cannot write",
        what,
        "File too large",
        f"the last good checkpoint is {root / 'step-00000003'}",
        "make room and go on with resume",
    ):
        assert words in message
    assert sorted(path.name for path in root.iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    resumed = train_process.start(tmp_path)
    resumed.join(120)
    assert resumed.exitcode == 0
    assert_same_run(tmp_path, whole)
