"""Training in JAX: `gpt2 train`, and its parts, for use in custom training loops.

Modules are imported when a name is first used.
"""

from typing import TYPE_CHECKING

from gpt2_jax.lazy_names import lazy_names

if TYPE_CHECKING:
    from gpt2_jax.training.config import OptimizerConfig, TrainConfig
    from gpt2_jax.training.errors import NonFiniteLoss, TrainingError
    from gpt2_jax.training.loop import train
    from gpt2_jax.training.optimizer import decay_mask, learning_rate_schedule, make_optimizer, scale_by_layer
    from gpt2_jax.training.optimizer_state import adamw_state, with_adamw_state
    from gpt2_jax.training.partial import freeze_params, join_params
    from gpt2_jax.training.presets import PRESETS
    from gpt2_jax.training.run.outcome import Outcome
    from gpt2_jax.training.state import TrainState, init_state, resolve_config
    from gpt2_jax.training.step import make_eval_step, make_train_step
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "gpt2_jax.training.config": ("OptimizerConfig", "TrainConfig"),
            "gpt2_jax.training.errors": ("NonFiniteLoss", "TrainingError"),
            "gpt2_jax.training.loop": ("train",),
            "gpt2_jax.training.optimizer": (
                "decay_mask",
                "learning_rate_schedule",
                "make_optimizer",
                "scale_by_layer",
            ),
            "gpt2_jax.training.optimizer_state": ("adamw_state", "with_adamw_state"),
            "gpt2_jax.training.partial": ("freeze_params", "join_params"),
            "gpt2_jax.training.presets": ("PRESETS",),
            "gpt2_jax.training.run.outcome": ("Outcome",),
            "gpt2_jax.training.state": ("TrainState", "init_state", "resolve_config"),
            "gpt2_jax.training.step": ("make_eval_step", "make_train_step"),
        },
    )

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
    "freeze_params",
    "init_state",
    "join_params",
    "learning_rate_schedule",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
    "resolve_config",
    "scale_by_layer",
    "train",
    "with_adamw_state",
]
