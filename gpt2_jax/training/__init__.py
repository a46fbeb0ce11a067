"""Training in JAX: `gpt2 train` and its parts."""

from gpt2_jax.training.config import PRESETS, NonFiniteLoss, OptimizerConfig, TrainConfig, TrainingError
from gpt2_jax.training.loop import Outcome, train
from gpt2_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from gpt2_jax.training.optimizer_state import adamw_state, with_adamw_state
from gpt2_jax.training.state import resolve_config
from gpt2_jax.training.step import TrainState, init_state, make_eval_step, make_train_step

__all__ = [
    "PRESETS",
    "NonFiniteLoss",
    "OptimizerConfig",
    "Outcome",
    "TrainConfig",
    "TrainState",
    "TrainingError",
    "adamw_state",
    "decay_mask",
    "init_state",
    "learning_rate_schedule",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "resolve_config",
    "train",
    "with_adamw_state",
]
