"""How well a model predicts a text: sliding windows, and the results of an evaluation."""

from bridge.evaluation.labels import IGNORE_INDEX, LabelScores
from bridge.evaluation.result import DocumentScore, Evaluation, TokenScores, document_scores, exp
from bridge.evaluation.windows import Progress, SlidingWindows, TokenizedText

__all__ = [
    "IGNORE_INDEX",
    "DocumentScore",
    "Evaluation",
    "LabelScores",
    "Progress",
    "SlidingWindows",
    "TokenScores",
    "TokenizedText",
    "document_scores",
    "exp",
]
