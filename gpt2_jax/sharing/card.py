"""The model card: a README.md with metadata for the hub, and a description of the model and its training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from bridge import __version__
from bridge.errors import escaped
from bridge.hub import CERTIFICATE
from gpt2_jax.parity.certificates.certificate import Certificate
from gpt2_jax.reporting.markup import GENERATOR
from gpt2_jax.sharing.evaluation import METRICS, EvaluationFacts
from gpt2_jax.sharing.facts import ModelFacts
from gpt2_jax.sharing.run import RunFacts

_MARK = f"<!-- Written by gpt2 push of {GENERATOR} "


def is_own_card(text: str) -> bool:
    """Whether `gpt2 push` wrote a card and it may be replaced. Remove the comment from a card to keep it."""
    return _MARK in text


def model_card(repo_id: str, facts: ModelFacts) -> str:
    """Return the text of a card for a repository."""
    name = repo_id.rpartition("/")[2]
    parts = [
        f"---\n{_yaml(_metadata(name, facts))}---\n\n{_MARK}{__version__}. -->",
        f"# {name}\n\n{_summary(facts)}",
        _usage(repo_id, facts),
        f"## Model\n\n{_table(('property', 'value'), _model_rows(facts))}",
    ]
    if facts.run is not None:
        parts.append(_training(facts.run))
    if facts.evaluation is not None:
        parts.append(_evaluation(facts.evaluation))
    if facts.certificate is not None:
        parts.append(_certificate(repo_id, facts.certificate))
    return "\n\n".join(parts) + "\n"


def _metadata(name: str, facts: ModelFacts) -> dict[str, Any]:
    """Return the hub's metadata; see "Model Cards" in the documentation of the hub."""
    metadata: dict[str, Any] = {
        "license": facts.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", GENERATOR],
    }
    results = []
    if facts.evaluation is not None:
        results.append(
            _result(facts.evaluation.data, {METRICS[k]: (k, v) for k, v in facts.evaluation.metrics.items()})
        )
    if facts.run is not None and facts.run.val_loss is not None:
        validation = {METRICS["loss"]: ("loss", facts.run.val_loss)}
        separate = bool(facts.run.config.validation_data)
        data = "separate validation data" if separate else "validation part of the training data"
        results.append(_result(data, validation))
    return {**metadata, "model-index": [{"name": name, "results": results}]} if results else metadata


def _result(data: str, metrics: Mapping[str, tuple[str, float]]) -> dict[str, Any]:
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": _plain(data), "type": "text"},
        "metrics": [{"type": kind, "name": name, "value": value} for name, (kind, value) in metrics.items()],
    }


def _summary(facts: ModelFacts) -> str:
    c = facts.config
    return (
        f"A GPT-2 language model with {facts.num_parameters:,} parameters: {c.n_layer} layers of width {c.n_embd} with "
        f"{c.n_head} heads, {c.n_positions} positions, and a vocabulary of {c.vocab_size:,}."
    )


def _usage(repo_id: str, facts: ModelFacts) -> str:
    lines = [
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("{repo_id}")',
    ]
    if facts.tokenizer is not None:
        lines = [
            "from transformers import pipeline",
            f'generate = pipeline("text-generation", "{repo_id}")',
        ]
    code = "\n".join([*lines, "", "import gpt2_jax", f'model, params = gpt2_jax.from_pretrained("{repo_id}")'])
    return f"## Use\n\nWith transformers, or with {GENERATOR} in JAX:\n\n```python\n{code}\n```"


def _model_rows(facts: ModelFacts) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{facts.num_parameters:,}"
    yield "activation", _code(facts.config.activation_function)
    yield "head", "tied to the token embedding" if facts.config.tie_word_embeddings else "not tied"
    yield "dtype of the weights", ", ".join(facts.dtypes)
    yield "tokenizer", _plain(facts.tokenizer) if facts.tokenizer is not None else "none; the model takes token ids"
    yield "SHA-256 of the weights", _code(facts.fingerprint)


def _training(run: RunFacts) -> str:
    columns = ("step", "train_loss", "val_loss", "learning_rate")
    used = [name for name in columns if any(name in point for point in run.points())]
    losses = _table(
        [name.replace("_", " ") for name in used],
        ([_number(point[name]) if name in point else "" for name in used] for point in run.points()),
    )
    known = run.config.init_from is not None or run.config.is_partial
    start = ", from the weights of another checkpoint" if known else ""
    part = ""
    if run.config.is_partial:
        part = f" Only {'an adapter' if run.config.lora.rank else 'a part of the weights'} was trained."
    loss = "" if run.val_loss is None else f" Its validation loss is {run.val_loss:.4f} nats per token."
    return (
        f"## Training\n\nTrained with `gpt2 train` of {GENERATOR}{start}.{part} This is the checkpoint of step "
        f"{run.step:,}, after batches with {run.tokens_seen:,} tokens.{loss}\n\n"
        f"The tokens of the training and validation data have the SHA-256 {_code(run.data)}. The data are not part of "
        f"this repository.\n\n{_table(('setting', 'value'), ((k, _code(_number(v))) for k, v in run.recipe.items()))}"
        + (f"\n\n### Losses\n\nNats per token.\n\n{losses}" if run.points() else "")
    )


def _evaluation(evaluation: EvaluationFacts) -> str:
    rows = [(METRICS[name], f"{value:.4f}") for name, value in evaluation.metrics.items()]
    rows += [(name.replace("_", " "), f"{value:,}") for name, value in evaluation.counts.items()]
    return (
        f"## Evaluation\n\n`gpt2 eval` on the text {_code(evaluation.data)}, in sliding windows:\n\n"
        f"{_table(('figure', 'value'), rows)}"
    )


def _certificate(repo_id: str, certificate: Certificate) -> str:
    versions = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in sorted(certificate.versions.items()))
    return (
        f"## Parity certificate\n\nThe file `{CERTIFICATE}` has outputs and gradients of these weights that PyTorch "
        f"computed in float64 ({versions}). This command checks that JAX computes the same:\n\n"
        f"```sh\nhf download {repo_id} --local-dir {repo_id.rpartition('/')[2]}\n"
        f"gpt2 verify {repo_id.rpartition('/')[2]} --against {repo_id.rpartition('/')[2]}/{CERTIFICATE}\n```"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, cells))} |" for cells in lines)


def _cell(text: str) -> str:
    """Escape `|`, as GitHub's Markdown requires in tables, also in code. It cannot have a backslash before it."""
    return text.replace("\\|", "\\\ufffd").replace("|", "\\|")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _plain(text: str) -> str:
    """Return text from a file without characters that mean something in Markdown, HTML or tables."""
    return "".join("\ufffd" if c in "`|<>[]*_\\" else c for c in escaped(text, keep=""))


def _code(text: str) -> str:
    return f"`{escaped(text, keep='').replace('`', chr(0xFFFD))}`"


def _yaml(value: Any, indent: str = "") -> str:
    """Return nested dictionaries and lists as YAML in block style. Scalars are JSON, which is a part of YAML."""
    lines = []
    for name, inner in value.items() if isinstance(value, dict) else (("-", item) for item in value):
        prefix = f"{indent}{name}" + (":" if isinstance(value, dict) else "")
        if not isinstance(inner, dict | list):
            lines.append(f"{prefix} {json.dumps(inner, ensure_ascii=False)}\n")
        elif isinstance(value, dict):
            lines.append(f"{prefix}\n{_yaml(inner, indent + '  ')}")
        else:
            lines.append(f"{prefix} {_yaml(inner, indent + '  ').removeprefix(indent + '  ')}")
    return "".join(lines)
