"""The eight questions, each a function from a subject to a `Check`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

import numpy as np

import bridge
from bridge import Checkpoint
from bridge.conversion import mixed_dtypes
from gpt2_jax.parity import jax_side, tolerances, torch_side, transformers_side
from gpt2_jax.parity.report import Check, Measurement
from gpt2_jax.parity.sites import distances, relative, relative_distance
from gpt2_jax.parity.training import AdamW

SHORT_NAMES = {"float64": "fp64", "float32": "fp32", "bfloat16": "bf16"}

TRAIN_STEPS = 10
SHORT_LENGTH = 64
"""Most tokens per sequence of the training and padding checks: what they test does not depend on length,
their time does."""

FP64_TRAIN_BYTES = 2 * 2**30
"""Ten steps are also run in float64 where weights, gradients and both moments fit in this."""


@dataclass(frozen=True)
class Subject:
    """What is examined: one checkpoint, on the same tokens everywhere."""

    checkpoint: Checkpoint
    ids: np.ndarray
    """[B, T] token ids."""
    is_text: bool
    """Whether the ids are text in the checkpoint's own tokens, so that a trained model predicts them."""
    untrained: bool = False
    """Whether the weights are known to be random, so that predicting nothing is no fault."""

    @property
    def n_layer(self) -> int:
        return self.checkpoint.config.n_layer


def logits(subject: Subject) -> Check:
    """The same logits in float64, float32 and bfloat16."""
    exact = torch_side.logits(subject.checkpoint, subject.ids, None, "float64")
    largest = float(np.abs(exact).max())
    ours = jax_side.logits(subject.checkpoint, subject.ids, None, "float64")
    measurements = _compared_logits("float64", exact, ours, subject)
    for dtype, ratio, floor in (
        ("float32", tolerances.ERROR_RATIO_FP32, tolerances.ERROR_FLOOR_FP32),
        ("bfloat16", tolerances.ERROR_RATIO_BF16, tolerances.ERROR_FLOOR_BF16),
    ):
        theirs = torch_side.logits(subject.checkpoint, subject.ids, None, dtype)
        ours = jax_side.logits(subject.checkpoint, subject.ids, None, dtype)
        measurements += _compared_logits(dtype, theirs, ours, subject)
        our_error, their_error = (max(rms(x - exact), floor * largest) for x in (ours, theirs))
        what = f"{SHORT_NAMES[dtype]} error against fp64, port over reference"
        measurements.append(Measurement(what, relative(our_error, their_error), ratio))
    check = Check("logits", tuple(measurements), note=f"largest logit {largest:.3g}")
    return check if check.holds else _located(check, subject)


def hidden_states(subject: Subject) -> Check:
    """The same hidden state after every layer and inside it, in float64."""
    everywhere = np.ones(subject.ids.shape, bool)
    far = _distances(subject, subject.ids, None, everywhere)
    worst = max(far, key=lambda site: far[site])
    measurements = (
        Measurement(f"fp64 largest difference, {len(far)} places", far[worst], tolerances.HIDDEN_FP64, worst),
    )
    return Check("hidden states", measurements, departs_at=_first_departure(far))


def gradients(subject: Subject) -> Check:
    """The same gradient of the loss for every parameter, in float64 and float32."""
    check = Check("gradients", _compared_gradients(torch_side, subject))
    return check if check.holds else _located(check, subject)


def training(subject: Subject) -> Check:
    """Ten AdamW steps, torch.optim against optax: the same losses, and the same weights at the end."""
    measurements = _trained(subject, "float32", tolerances.TRAIN_LOSS, tolerances.TRAIN_UPDATE_FP32)
    # Weights, gradients and two moments, of 8 bytes each.
    if bridge.num_parameters(subject.checkpoint.config) * 4 * 8 > FP64_TRAIN_BYTES:
        return Check("training", measurements, note="fp64 left out: it would need more than 2 GiB a side")
    exact = _trained(subject, "float64", tolerances.TRAIN_LOSS_FP64, tolerances.TRAIN_UPDATE_FP64)
    return Check("training", (*exact, *measurements))


def padding(subject: Subject) -> Check:
    """Rows of different length in one batch, padded left or right, each equal to the row alone."""
    T = min(subject.ids.shape[1], SHORT_LENGTH)
    lengths = [max(1, T * (i + 1) // 4) for i in range(4)]
    rows = [subject.ids[i % len(subject.ids), :n] for i, n in enumerate(lengths)]
    alone = [torch_side.logits(subject.checkpoint, row[None], None, "float64")[0] for row in rows]
    measurements = []
    departs_at = ""
    for side in ("left", "right"):
        ids, mask = _padded(rows, side)
        for backend in (torch_side, jax_side):
            batch = backend.logits(subject.checkpoint, ids, mask, "float64")
            far = [relative_distance(batch[i][mask[i] == 1], row) for i, row in enumerate(alone)]
            worst = int(np.argmax(far))
            what = f"{backend.NAME}, padded {side}, against the row alone"
            measurements.append(Measurement(what, far[worst], tolerances.PADDING_FP64, f"row of {lengths[worst]}"))
        if not measurements[-1].holds and not departs_at:
            departs_at = _first_departure(_distances(subject, ids, mask, mask == 1))
    return Check("padding", tuple(measurements), departs_at=departs_at)


def round_trip(subject: Subject) -> Check:
    """To the Flax tree and back, per layer and stacked: every tensor byte for byte."""
    checkpoint = subject.checkpoint
    forms = [False] if mixed_dtypes(checkpoint.tensors, checkpoint.config) else [False, True]
    measurements = []
    for stacked in forms:
        there = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=stacked)
        back = bridge.to_torch(there, checkpoint.config)
        changed = [name for name in checkpoint.tensors if not _same_bytes(checkpoint.tensors[name], back.get(name))]
        form = "stacked" if stacked else "per layer"
        what = f"tensors that come back changed, {form}, of {len(checkpoint.tensors)}"
        measurements.append(Measurement(what, len(changed), 0, ", ".join(changed[:3])))
    note = "" if True in forms else "not stacked: layers of different dtypes cannot be"
    return Check("round trip", tuple(measurements), note)


def prediction(subject: Subject) -> Check:
    """The loss on text beside ln(V): a checkpoint laid out wrongly agrees with itself and predicts nothing."""
    if not subject.is_text:
        return Check("prediction", note="it needs text in the checkpoint's own tokens, which --text gives")
    uniform = math.log(subject.checkpoint.config.vocab_size)
    limit = None if subject.untrained else tolerances.PREDICTS
    measurements = []
    for backend in (torch_side, jax_side):
        values = backend.logits(subject.checkpoint, subject.ids, None, "float32")
        loss = _mean_loss(values, subject.ids)
        what = f"{backend.NAME} loss {loss:.4f} nats per token, over ln(V) = {uniform:.4f}"
        measurements.append(Measurement(what, loss / uniform, limit))
    check = Check("prediction", tuple(measurements))
    if not check.holds:
        note = "worse than guessing: the weights are laid out wrongly, or were never trained (--untrained)"
        return Check(check.name, check.measurements, note)
    return check


def transformers(subject: Subject) -> Check:
    """transformers' own model as a third opinion on logits and gradients."""
    name = "transformers"
    if not transformers_side.is_installed():
        return Check(name, note="it is not installed")
    if not subject.checkpoint.config.bias:
        return Check(name, note="its GPT-2 always has biases, this one has none")
    measurements = []
    for dtype in ("float64", "float32"):
        theirs = transformers_side.logits(subject.checkpoint, subject.ids, dtype)
        ours = jax_side.logits(subject.checkpoint, subject.ids, None, dtype)
        measurements += _compared_logits(dtype, theirs, ours, subject)
    check = Check(name, (*measurements, *_compared_gradients(transformers_side, subject)))
    return check if check.holds else _located(check, subject)


CHECKS: Mapping[str, Callable[[Subject], Check]] = {
    "logits": logits,
    "hidden-states": hidden_states,
    "gradients": gradients,
    "training": training,
    "padding": padding,
    "round-trip": round_trip,
    "prediction": prediction,
    "transformers": transformers,
}
"""In the order of the report; the names are those of `gpt2 verify --checks`."""


def _compared_logits(dtype: str, theirs: np.ndarray, ours: np.ndarray, subject: Subject) -> list[Measurement]:
    """How far apart two sets of logits are; in bfloat16 for information, as errors are judged there."""
    largest = float(np.abs(theirs).max())
    limits: dict[str, tuple[float | None, float | None, float | None]] = {
        # largest difference, KL, share of tokens with another top-1
        "float64": (tolerances.LOGITS_FP64 * largest, tolerances.KL_FP64, 0.0),
        "float32": (tolerances.logits_fp32(largest, subject.n_layer), tolerances.KL_FP32, None),
        "bfloat16": (None, None, None),
    }
    difference = np.abs(theirs - ours)
    kl = float(np.max([largest_kl(a, b) for a, b in zip(theirs, ours, strict=True)]))
    other_top = float((theirs.argmax(-1) != ours.argmax(-1)).mean())
    short = SHORT_NAMES[dtype]
    return [
        Measurement(f"{short} logits, largest difference", float(difference.max()), limits[dtype][0]),
        Measurement(f"{short} logits, mean difference", float(difference.mean())),
        Measurement(f"{short} largest KL per token, nats", kl, limits[dtype][1]),
        Measurement(f"{short} share of tokens with another top-1", other_top, limits[dtype][2]),
    ]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def largest_kl(a_TV: np.ndarray, b_TV: np.ndarray) -> float:
    """max over tokens of KL(softmax a || softmax b), in float64."""
    log_a, log_b = (x - _logsumexp(x)[:, None] for x in (a_TV, b_TV))
    return float((np.exp(log_a) * (log_a - log_b)).sum(-1).max())


def _logsumexp(x_TV: np.ndarray) -> np.ndarray:
    top = x_TV.max(-1)
    return top + np.log(np.exp(x_TV - top[:, None]).sum(-1))


def _mean_loss(logits_BTV: np.ndarray, ids_BT: np.ndarray) -> float:
    per_row = [
        (_logsumexp(row[:-1]) - np.take_along_axis(row[:-1], ids[1:, None], 1)[:, 0]).mean()
        for row, ids in zip(logits_BTV, ids_BT, strict=True)
    ]
    return float(np.mean(per_row))


def _compared_gradients(theirs: ModuleType, subject: Subject) -> tuple[Measurement, ...]:
    measurements = []
    for dtype, limit in (("float64", tolerances.GRADIENT_FP64), ("float32", tolerances.GRADIENT_FP32)):
        far = _gradient_distances(theirs, subject, dtype)
        worst = max(far, key=lambda n: far[n])
        what = f"{SHORT_NAMES[dtype]} gradients, largest relative distance of {len(far)}"
        measurements.append(Measurement(what, far[worst], limit, worst))
    return tuple(measurements)


def _gradient_distances(theirs: ModuleType, subject: Subject, dtype: str) -> dict[str, float]:
    expected = theirs.gradients(subject.checkpoint, subject.ids, dtype)
    found = jax_side.gradients(subject.checkpoint, subject.ids, dtype)
    return {n: _relative_l2(found[n], expected[n]) if n in expected else math.inf for n in found}


def _relative_l2(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = (x.astype(np.float64, copy=False) for x in (found, expected))
    return relative(float(np.linalg.norm(found - expected)), float(np.linalg.norm(expected)))


def _trained(subject: Subject, dtype: str, loss_limit: float, update_limit: float) -> tuple[Measurement, ...]:
    batches = _train_batches(subject)
    their_losses, theirs = torch_side.train(subject.checkpoint, batches, dtype, AdamW())
    our_losses, ours = jax_side.train(subject.checkpoint, batches, dtype, AdamW())
    loss = float(np.abs(np.subtract(their_losses, our_losses)).max())
    far = {
        name: _relative_l2(_with_gradient(name, ours[name] - start), _with_gradient(name, theirs[name] - start))
        for name, start in subject.checkpoint.tensors.items()
    }
    worst = max(far, key=lambda name: far[name])
    short = SHORT_NAMES[dtype]
    return (
        Measurement(f"{short} losses of {len(batches)} steps, largest difference", loss, loss_limit),
        Measurement(f"{short} change of weights, largest relative distance", far[worst], update_limit, worst),
    )


def _with_gradient(name: str, change: np.ndarray) -> np.ndarray:
    """Without the bias of the keys: softmax does not see it, its true gradient is 0, and Adam, which
    divides a gradient by its own size, moves it by rounding noise."""
    if not name.endswith("c_attn.bias"):
        return change
    query, _, value = np.split(change, 3)
    return np.concatenate([query, value])


def _train_batches(subject: Subject) -> np.ndarray:
    """[steps, B, T]: the subject's tokens, begun at another place for every step."""
    B, T = subject.ids.shape
    length = min(T, SHORT_LENGTH)
    stream = subject.ids.reshape(-1)
    starts = [step * len(stream) // TRAIN_STEPS for step in range(TRAIN_STEPS)]
    return np.stack([np.resize(np.roll(stream, -start), (B, length)) for start in starts])


def _padded(rows: list[np.ndarray], side: str) -> tuple[np.ndarray, np.ndarray]:
    """[B, T] ids and mask; padding has an id of its own choosing, 0, which must not matter."""
    T = max(map(len, rows))
    ids, mask = np.zeros((len(rows), T), np.int64), np.zeros((len(rows), T), np.int64)
    for i, row in enumerate(rows):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def _same_bytes(a: np.ndarray, b: np.ndarray | None) -> bool:
    return b is not None and a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _distances(subject: Subject, ids: np.ndarray, mask: np.ndarray | None, real: np.ndarray) -> dict[str, float]:
    expected = torch_side.trace(subject.checkpoint, ids, mask)
    return distances(expected, jax_side.trace(subject.checkpoint, ids, mask), real)


def _first_departure(far: Mapping[str, float]) -> str:
    return next((site for site, distance in far.items() if not distance <= tolerances.HIDDEN_FP64), "")


def _located(check: Check, subject: Subject) -> Check:
    """The check with the first place of the forward pass at which the port departs, if there is one."""
    far = _distances(subject, subject.ids, None, np.ones(subject.ids.shape, bool))
    return Check(check.name, check.measurements, check.note, _first_departure(far))
