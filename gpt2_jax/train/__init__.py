"""Training in JAX: `gpt2 train` and its parts."""

from gpt2_jax.train.begin import settle
from gpt2_jax.train.config import PRESETS, NonFiniteLoss, OptimizerConfig, TrainConfig, TrainingError
from gpt2_jax.train.loop import Outcome, train
from gpt2_jax.train.optimizer import learning_rate_schedule, make_optimizer
from gpt2_jax.train.optimizer_state import adamw_state, with_adamw_state
from gpt2_jax.train.step import TrainState, init_state, make_eval_step, make_train_step

__all__ = [
    "PRESETS",
    "NonFiniteLoss",
    "OptimizerConfig",
    "Outcome",
    "TrainConfig",
    "TrainState",
    "TrainingError",
    "adamw_state",
    "init_state",
    "learning_rate_schedule",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "settle",
    "train",
    "with_adamw_state",
]
