"""Training: chats -> batches -> a jitted step -> checkpoints, and what drives it."""

from ktjax.models.targets import FrozenTargetError
from ktjax.train.adapters import read_run
from ktjax.train.batching import Batch, Batcher, BatchStream, Position
from ktjax.train.checkpoint import CheckpointError
from ktjax.train.config import TrainConfig
from ktjax.train.config_file import ConfigFileError, read_config_file
from ktjax.train.data import (
    Chat,
    DataError,
    Example,
    read_chats,
    split_chats,
    tokenize,
)
from ktjax.train.loop import FitResult, TrainingError, fit
from ktjax.train.loss import weigh
from ktjax.train.metrics import MetricsError
from ktjax.train.objective import SFT, Objective, dpo
from ktjax.train.run import TrainResult, run_training
from ktjax.train.step import (
    Frozen,
    SplitModel,
    TrainState,
    init_state,
    make_eval_step,
    make_optimizer,
    make_schedule,
    make_train_step,
    split_model,
)

__all__ = [
    "SFT",
    "Batch",
    "BatchStream",
    "Batcher",
    "Chat",
    "CheckpointError",
    "ConfigFileError",
    "DataError",
    "Example",
    "FitResult",
    "Frozen",
    "FrozenTargetError",
    "MetricsError",
    "Objective",
    "Position",
    "SplitModel",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "TrainingError",
    "dpo",
    "fit",
    "init_state",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "read_chats",
    "read_config_file",
    "read_run",
    "run_training",
    "split_chats",
    "split_model",
    "tokenize",
    "weigh",
]
