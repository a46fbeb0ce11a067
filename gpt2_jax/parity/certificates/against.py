"""Check the JAX model against a certificate. Needs no PyTorch.

Each check is a function from `CertifiedInputs` to a `Check`. The tolerances are those of the certificate, or of this
version of the project if they are stricter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import jax
import numpy as np

import bridge
import gpt2_jax.parity.backends.jax_gpt2 as jax_gpt2
import gpt2_jax.parity.reporting.plots as plots
import gpt2_jax.parity.tolerances as tolerances
from bridge import Checkpoint, GPT2Config
from bridge.config import TRAINING_ONLY
from bridge.errors import bullet_list, quoted
from gpt2_jax.parity.activations import Outputs, layer_outputs
from gpt2_jax.parity.certificates.certificate import Certificate, CertificateError
from gpt2_jax.parity.certificates.sketch import gradient_sketch
from gpt2_jax.parity.comparisons import measure_logits
from gpt2_jax.parity.metrics import max_relative_difference, relative
from gpt2_jax.parity.reporting.report import CERTIFIED, Check, Compared, Measurement, Report
from gpt2_jax.reporting.environment import environment


@dataclass(frozen=True)
class CertifiedInputs:
    """The inputs of all checks against a certificate."""

    checkpoint: Checkpoint
    certificate: Certificate
    precision: str

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint's weights."""
        return bridge.fingerprint(self.checkpoint.tensors)

    @cached_property
    def outputs(self) -> Outputs:
        """What JAX computes in float64."""
        return jax_gpt2.outputs(self.checkpoint, self.certificate.ids, None, self.certificate.positions, "float64")

    @cached_property
    def state_differences(self) -> dict[str, float]:
        """Maximum relative difference of each layer's output in float64, in the order of the forward pass."""
        expected, actual = self.certificate.outputs.hidden_states, self.outputs.hidden_states
        names = layer_outputs(self.checkpoint.config.n_layer)
        return {name: max_relative_difference(actual[:, :, i], expected[:, :, i]) for i, name in enumerate(names)}

    def with_first_divergence(self, check: Check) -> Check:
        """Add the first layer whose output departs from the certificate to a failed check."""
        if check.passed:
            return check
        limit = self.certificate.bounds["hidden_states"]
        layers = (name for name, difference in self.state_differences.items() if not difference <= limit)
        return replace(check, first_divergence=next(layers, ""))

    def location(self, difference_BK: np.ndarray) -> str:
        """The row and the position of the largest difference [B, K]."""
        row, k = np.unravel_index(difference_BK.argmax(), difference_BK.shape)
        return f"row {row}, position {self.certificate.positions[k]}"


def weights(inputs: CertifiedInputs) -> Check:
    """The weights have every bit of the certified ones."""
    tensors, certificate = inputs.checkpoint.tensors, inputs.certificate
    changed = []
    if inputs.fingerprint != certificate.fingerprint:
        changed = [
            name for name, tensor in tensors.items() if bridge.fingerprint({name: tensor}) != certificate.digests[name]
        ]
    name = f"changed tensors of {len(tensors)}, by fingerprint"
    return Check("weights", (Measurement(name, len(changed), 0, ", ".join(changed[:3])),))


def configuration(inputs: CertifiedInputs) -> Check:
    """The configuration gives the same function. Settings for training only are not compared."""
    different = different_fields(inputs.checkpoint.config, inputs.certificate.config)
    return Check("configuration", (Measurement("different fields", len(different), 0, "; ".join(different)),))


def logits(inputs: CertifiedInputs) -> Check:
    """The logits at the chosen positions are equal in float64."""
    certificate = inputs.certificate
    expected, bounds = certificate.outputs.logits, certificate.bounds
    limit = bounds["logits"] * certificate.largest_logit
    positions = certificate.positions.tolist()
    compared = measure_logits("fp64", expected, inputs.outputs.logits, limit, bounds["kl"], 0.0, positions)
    worst, *others = compared.measurements
    location = inputs.location(np.abs(expected - inputs.outputs.logits).max(-1))
    note = f"largest logit {certificate.largest_logit:.3g}"
    check = Check("logits", (replace(worst, location=location), *others), note, plots=compared.plots)
    return inputs.with_first_divergence(check)


def hidden_states(inputs: CertifiedInputs) -> Check:
    """The embeddings and the output of every layer are equal in float64."""
    differences = inputs.state_differences
    worst = max(differences, key=differences.__getitem__)
    name = f"fp64 max relative difference of {len(differences)} layers"
    limit = inputs.certificate.bounds["hidden_states"]
    curve = plots.by_activation("Differences in fp64, by layer", differences, limit)
    check = Check("hidden states", (Measurement(name, differences[worst], limit, worst),), plots=(curve,))
    return inputs.with_first_divergence(check)


def losses(inputs: CertifiedInputs) -> Check:
    """The loss of every token is equal in float64."""
    difference = np.abs(inputs.outputs.losses - inputs.certificate.outputs.losses)
    row, position = np.unravel_index(difference.argmax(), difference.shape)
    limit = inputs.certificate.bounds["losses"] * inputs.certificate.largest_logit
    name = f"fp64 losses of {difference.size} tokens, max difference, nats"
    measurement = Measurement(name, float(difference.max()), limit, f"row {row}, position {position}")
    title = "Difference of the losses by position, maximum over the rows"
    curve = plots.by_position(title, "nats", "fp64", difference, bound=limit)
    return inputs.with_first_divergence(Check("losses", (measurement,), plots=(curve,)))


def gradients(inputs: CertifiedInputs) -> Check:
    """The gradient of the mean loss has the same norm, and the same dot product with random signs, in float64."""
    certificate = inputs.certificate
    actual = gradient_sketch(jax_gpt2.gradients(inputs.checkpoint, certificate.ids, "float64"))
    norms = certificate.gradients[:, 0]
    names = sorted(certificate.digests)
    compared = []
    for column, what in enumerate(("norms", "projections")):
        difference = np.abs(actual[:, column] - certificate.gradients[:, column])
        ratios = [relative(*pair) for pair in zip(difference.tolist(), norms.tolist(), strict=True)]
        worst = int(np.argmax(ratios))
        name = f"fp64 gradients, max relative difference of {len(names)} {what}"
        limit = certificate.bounds[f"gradient_{what}"]
        values = dict(zip(names, ratios, strict=True))
        curve = plots.by_parameter("Distance of the gradients, by parameter", what, values, limit)
        compared.append(Compared((Measurement(name, ratios[worst], limit, names[worst]),), (curve,)))
    return inputs.with_first_divergence(Check.of("gradients", compared))


def padding(inputs: CertifiedInputs) -> Check:
    """Rows of different lengths, padded on the left, have the same losses in float64."""
    certificate = inputs.certificate
    none = np.array([], np.int64)
    actual = jax_gpt2.outputs(inputs.checkpoint, certificate.padded_ids, certificate.padded_mask, none, "float64")
    difference = np.abs(actual.losses - certificate.padded_losses)
    limit = certificate.bounds["losses"] * certificate.largest_logit
    rows = difference.max(-1, initial=0.0)
    name = f"fp64 losses of {len(rows)} rows padded left, max difference, nats"
    title = "Difference of the losses of padded rows by position, maximum over the rows"
    curve = plots.by_position(title, "nats", "fp64", difference, bound=limit)
    measurement = Measurement(name, float(rows.max()), limit, f"row {rows.argmax()}")
    return inputs.with_first_divergence(Check("padding", (measurement,), plots=(curve,)))


def float32(inputs: CertifiedInputs) -> Check:
    """The logits in float32, on the default device, differ from the certified ones by rounding only."""
    certificate = inputs.certificate
    platform, expected = jax.default_backend(), certificate.outputs.logits
    roundoff = tolerances.matmul_roundoff(platform, inputs.precision)
    actual = jax_gpt2.outputs(
        inputs.checkpoint, certificate.ids, None, certificate.positions, "float32", inputs.precision
    ).logits
    limit = tolerances.logits_fp32(certificate.largest_logit, inputs.checkpoint.config.n_layer, roundoff)
    limit *= certificate.bounds["logits_fp32"] / tolerances.LOGITS_FP32
    kl_limit = tolerances.kl_fp32(roundoff) * certificate.bounds["kl_fp32"] / tolerances.KL_FP32
    positions = certificate.positions.tolist()
    compared = measure_logits("fp32", expected, actual, limit, kl_limit, positions=positions)
    note = f"{described(platform, inputs.precision)}, against fp64"
    return inputs.with_first_divergence(Check.of("float32", [compared], note))


CERTIFIED_CHECKS: Mapping[str, Callable[[CertifiedInputs], Check]] = {
    "weights": weights,
    "configuration": configuration,
    "logits": logits,
    "hidden-states": hidden_states,
    "losses": losses,
    "gradients": gradients,
    "padding": padding,
    "float32": float32,
}
"""In the order of the report. The keys are the names in `gpt2 verify --against FILE --checks`."""


def verify_against(
    checkpoint: Checkpoint,
    certificate: Certificate,
    *,
    source: str = "",
    precision: str = "highest",
    checks: Iterable[str] | None = None,
    progress: Callable[[str], None] = lambda name: None,
) -> Report:
    """Run the checks and return their report. float64 runs on the CPU, float32 on JAX's default device.

    Args:
        checkpoint: a language model, whose parameters have the certificate's names and shapes.
        certificate: from `read_certificate`.
        source: the name of the checkpoint in the report.
        precision: `jax.default_matmul_precision` of the check of float32: `default`, `high` or `highest`.
        checks: names from `CERTIFIED_CHECKS`. The default is all of them.
        progress: called with the name of each check before it starts.

    Raises:
        CertificateError: the certificate is of a model with other parameters, so nothing can be compared.
    """
    _require_same_parameters(checkpoint.config, certificate.config)
    inputs = CertifiedInputs(checkpoint, certificate, precision)
    results = []
    for name in CERTIFIED_CHECKS if checks is None else checks:
        progress(name)
        results.append(CERTIFIED_CHECKS[name](inputs))
    B, T = certificate.ids.shape
    versions = ", ".join(f"{name} {version}" for name, version in certificate.versions.items())
    details = {
        "model": f"{bridge.num_parameters(checkpoint.config):,} parameters, {checkpoint.config.n_layer} layers",
        "tokens": f"{B} x {T}, {quoted(certificate.tokens, 200)[1:-1]}",
        "certificate": f"made with {quoted(versions, 300)[1:-1]}",
        "float32": described(jax.default_backend(), precision),
    }
    title = source or str(checkpoint.path or checkpoint.format)
    return Report(
        title,
        details,
        tuple(results),
        checkpoint.diagnostics,
        CERTIFIED,
        config=dataclasses.asdict(checkpoint.config),
        fingerprint=inputs.fingerprint,
        environment=environment(),
    )


def described(platform: str, precision: str) -> str:
    """A description of float32 matrix products on a device: their precision and its unit round-off."""
    roundoff = int(np.log2(tolerances.matmul_roundoff(platform, precision)))
    return f"matrix products on {platform} at precision {precision}: unit round-off 2^{roundoff}"


def different_fields(config: GPT2Config, certified: GPT2Config) -> list[str]:
    """Describe each field that differs and changes the function."""
    sizes = {"n_inner": (config.feed_forward_size, certified.feed_forward_size)}  # None means 4 D
    fields = [field.name for field in dataclasses.fields(GPT2Config) if field.name not in TRAINING_ONLY]
    pairs = {name: sizes.get(name, (getattr(config, name), getattr(certified, name))) for name in fields}
    return [f"{name}={own!r} instead of {other!r}" for name, (own, other) in pairs.items() if own != other]


def _require_same_parameters(config: GPT2Config, certified: GPT2Config) -> None:
    own, other = ({p.torch_name: p.torch_shape for p in bridge.parameters(c)} for c in (config, certified))
    if own != other:
        raise CertificateError(
            "the certificate is of a model with other parameters; give the certificate of this model:\n"
            + bullet_list(different_fields(config, certified))
        )
