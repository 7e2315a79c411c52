"""Training: chats -> batches -> a jitted step -> checkpoints, and what drives it."""

from ktjax.train.adapters import read_run
from ktjax.train.batching import Batch, Batcher, BatchStream, Position
from ktjax.train.checkpoint import CheckpointError
from ktjax.train.config import GenerateConfig, TrainConfig
from ktjax.train.data import Chat, DataError, Example, read_chats, tokenize
from ktjax.train.loop import FitResult, TrainingError, fit
from ktjax.train.loss import weigh
from ktjax.train.run import TrainResult, run_generation, run_training
from ktjax.train.step import (
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
    "Batch",
    "BatchStream",
    "Batcher",
    "Chat",
    "CheckpointError",
    "DataError",
    "Example",
    "FitResult",
    "GenerateConfig",
    "Position",
    "SplitModel",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "TrainingError",
    "fit",
    "init_state",
    "make_eval_step",
    "make_optimizer",
    "make_schedule",
    "make_train_step",
    "read_chats",
    "read_run",
    "run_generation",
    "run_training",
    "split_model",
    "tokenize",
    "weigh",
]
