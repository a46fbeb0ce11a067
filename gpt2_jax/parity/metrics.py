"""Distances between arrays, in float64."""

from __future__ import annotations

import numpy as np


def relative(difference: float, scale: float) -> float:
    """`difference / scale`, or infinity if either is NaN. 0 / 0 is 0."""
    if np.isnan(difference) or np.isnan(scale):
        return float("inf")
    return difference / max(scale, float(np.finfo(np.float64).tiny))


def max_relative_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """max |actual - expected| / max |expected|."""
    return relative(float(np.abs(actual - expected).max()), float(np.abs(expected).max()))


def relative_l2_difference(actual: np.ndarray, expected: np.ndarray) -> float:
    """||actual - expected|| / ||expected||, both L2 norms."""
    actual, expected = (x.astype(np.float64, copy=False) for x in (actual, expected))
    return relative(float(np.linalg.norm(actual - expected)), float(np.linalg.norm(expected)))


def rms(x: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(x))))


def kl_divergence(a_TV: np.ndarray, b_TV: np.ndarray) -> np.ndarray:
    """KL(softmax(a) || softmax(b)) of each token [T], in nats."""
    log_a, log_b = (x - _logsumexp(x)[:, None] for x in (a_TV, b_TV))
    divergence: np.ndarray = (np.exp(log_a) * (log_a - log_b)).sum(-1)
    return divergence


def max_kl(a_TV: np.ndarray, b_TV: np.ndarray) -> float:
    """Maximum of `kl_divergence` over the tokens."""
    return float(kl_divergence(a_TV, b_TV).max())


def next_token_loss(logits_BTV: np.ndarray, ids_BT: np.ndarray) -> float:
    """Mean cross entropy of predicting `ids[:, 1:]`, in nats per token."""
    return float(next_token_losses(logits_BTV, ids_BT).mean(1).mean())


def next_token_losses(logits_BTV: np.ndarray, ids_BT: np.ndarray) -> np.ndarray:
    """Cross entropy [B, T - 1] of predicting `ids[:, 1:]`, in nats."""
    losses = [
        _logsumexp(logits[:-1]) - np.take_along_axis(logits[:-1], ids[1:, None], 1)[:, 0]
        for logits, ids in zip(logits_BTV, ids_BT, strict=True)
    ]
    return np.stack(losses)


def _logsumexp(x_TV: np.ndarray) -> np.ndarray:
    top = x_TV.max(-1)
    return top + np.log(np.exp(x_TV - top[:, None]).sum(-1))
