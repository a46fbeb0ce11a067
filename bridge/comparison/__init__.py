"""The comparison of two checkpoints, without a framework. `gpt2_jax.diff` runs the models too."""

from bridge.comparison.compare import Comparison, compare
from bridge.comparison.optimizer import OptimizerComparison
from bridge.comparison.settings import Difference
from bridge.comparison.symmetries import Permutation
from bridge.comparison.tensors import TensorComparison, TensorsComparison
from bridge.comparison.tokenizers import TokenizerComparison
from bridge.comparison.values import Values

__all__ = [
    "Comparison",
    "Difference",
    "OptimizerComparison",
    "Permutation",
    "TensorComparison",
    "TensorsComparison",
    "TokenizerComparison",
    "Values",
    "compare",
]
