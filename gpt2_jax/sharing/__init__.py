"""Share a checkpoint on the Hugging Face hub, with a generated model card."""

from gpt2_jax.sharing.card import is_own_card, model_card
from gpt2_jax.sharing.errors import SharingError
from gpt2_jax.sharing.evaluation import EvaluationFacts, read_evaluation
from gpt2_jax.sharing.export import Export, prepare, require_license, require_repo_id
from gpt2_jax.sharing.facts import ModelFacts
from gpt2_jax.sharing.run import RunFacts, run_facts

__all__ = [
    "EvaluationFacts",
    "Export",
    "ModelFacts",
    "RunFacts",
    "SharingError",
    "is_own_card",
    "model_card",
    "prepare",
    "read_evaluation",
    "require_license",
    "require_repo_id",
    "run_facts",
]
