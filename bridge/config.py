"""The configuration of a GPT-2, and reading and writing it as Hugging Face's `config.json`.

Both backends use `GPT2Config`. It describes only the model: it has no dtypes, devices, meshes or optimizer settings.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from bridge.config_fields import ALIASES, STATED, is_ignored, unsupported
from bridge.errors import ConfigError, bullet_list, quoted

ACTIVATIONS = (
    "gelu_new",
    "gelu",
    "gelu_fast",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "relu",
    "silu",
    "swish",
    "tanh",
    "gelu_python",
    "gelu_accurate",
    "mish",
    "relu2",
    "relu6",
    "sigmoid",
    "linear",
)
"""Values of Hugging Face's `activation_function`. Each backend defines the formulas."""


TRAINING_ONLY = ("embd_pdrop", "attn_pdrop", "resid_pdrop", "initializer_range")
"""Fields of `GPT2Config` that affect only training, not the output of the trained model."""


@dataclass(frozen=True)
class GPT2Config:
    """Sizes and switches of one GPT-2. The defaults are OpenAI's 124M model.

    Field names are those of Hugging Face's `config.json`. The constructor raises a `ConfigError` that names every
    invalid field.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and
    `transformers.GPT2Config` for the switches added since.
    """

    vocab_size: int = 50257
    """V: rows of the token embedding, one per token."""
    n_positions: int = 1024
    """P: maximum sequence length, the rows of the learned position embedding."""
    n_embd: int = 768
    """D: width of the residual stream."""
    n_layer: int = 12
    """L: number of layers."""
    n_head: int = 12
    """H: attention heads per layer; divides `n_embd`."""
    n_inner: int | None = None
    """F: width of the feed-forward layer. None means 4 * n_embd."""
    activation_function: str = "gelu_new"
    """One of `bridge.config.ACTIVATIONS`. `gelu_new` is the tanh approximation of GELU."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in every LayerNorm."""
    initializer_range: float = 0.02
    """Standard deviation of initial weights. Divided by sqrt(2 L) for projections into the residual stream."""
    embd_pdrop: float = 0.0
    """Dropout rate after the embeddings. Dropout is applied in training only."""
    attn_pdrop: float = 0.0
    """Dropout rate of the attention weights."""
    resid_pdrop: float = 0.0
    """Dropout rate of the output of each sub-layer, before it is added to the residual stream."""
    scale_attn_weights: bool = True
    """Divide attention scores by sqrt(K)."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Also divide attention scores by the layer's number, counted from 1 (stanford-crfm/mistral)."""
    reorder_and_upcast_attn: bool = False
    """Compute attention scores in float32, independent of the compute dtype (stanford-crfm/mistral)."""
    tie_word_embeddings: bool = True
    """Use the token embedding as the output head."""
    bias: bool = True
    """Whether projections and LayerNorms have biases. False is nanoGPT's `bias=False`."""

    def __post_init__(self) -> None:
        wrong_types = _wrong_types(self)
        well_typed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in wrong_types}
        if problems := [*wrong_types.values(), *_out_of_range(well_typed)]:
            raise ConfigError("this is not a GPT-2 configuration:\n" + bullet_list(problems))

    @property
    def head_size(self) -> int:
        """K: width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def feed_forward_size(self) -> int:
        """F: width of the feed-forward layer, `n_inner` or its default."""
        return 4 * self.n_embd if self.n_inner is None else self.n_inner

    @property
    def residual_std(self) -> float:
        """Standard deviation of the initial weights of the 2 L projections into the residual stream.

        Source: Radford et al. 2019, section 2.3.
        """
        return self.initializer_range / math.sqrt(2 * self.n_layer)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> GPT2Config:
        """Return the configuration that a Hugging Face `config.json` describes.

        Missing fields get the defaults of transformers, such as a dropout rate of 0.1.

        Raises:
            ConfigError: a field requires a computation that is not implemented (`bridge.config_fields`). Unknown
                fields raise it too if their names suggest such a computation. `config_diagnostics` reports the others.
        """
        if not isinstance(hf, Mapping):
            raise ConfigError(f"config.json must hold an object, not {type(hf).__name__}")
        if unusable := [name for name in hf if not isinstance(name, str) or len(name) > _LONGEST_NAME]:
            raise ConfigError(
                f"config.json has the field {quoted(unusable[0])}: names must be text of at most {_LONGEST_NAME} "
                "characters"
            )
        if foreign := _foreign_model(hf):  # do not report its fields: they may be valid for that model
            raise ConfigError("config.json describes another kind of model:\n" + bullet_list(foreign))
        values, problems = _own_fields(hf)
        problems = [*_unsupported_fields(hf), *problems]
        if problems:
            raise ConfigError("config.json describes a model that is not supported:\n" + bullet_list(problems))
        config = cls(**values)
        if problems := _contradictions(hf, config):
            raise ConfigError("config.json contradicts itself:\n" + bullet_list(problems))
        return config

    def to_hf(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the fields of a `config.json` from which transformers builds the same model.

        `n_ctx`, the former name of `n_positions`, is among them: llama.cpp's converter and TransformerLens read it.

        Args:
            extra: further fields, from `harmless_fields`. Fields of this configuration take precedence, also under the
                names of other programs (`bridge.config_fields.STATED`).

        Raises:
            ConfigError: `bias=False`, which Hugging Face's GPT-2 does not support.
        """
        if not self.bias:
            raise ConfigError(
                "bias=False: Hugging Face's GPT-2 always has biases; export checkpoint.with_biases(), which adds "
                "biases of zero (gpt2 convert --zero-biases)"
            )
        own = {name: getattr(self, name) for name in _HF_FIELDS}
        extra = dict(extra or {})
        stated = {name: getattr(self, STATED[name]) for name in extra.keys() & STATED if extra[name] is not None}
        extra.update({name: value for name, value in stated.items() if extra[name] != value})
        fixed = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
        return {**extra, **fixed, **own, "n_ctx": self.n_positions}


def harmless_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a `config.json` that `GPT2Config` does not have, to keep them in a round trip."""
    return {
        name: value for name, value in hf.items() if name not in _KNOWN and name not in ("model_type", "architectures")
    }


def config_diagnostics(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Return one sentence for each thing in a `config.json` that transformers' GPT-2 does not read.

    Args:
        hf: a `config.json` that `GPT2Config.from_hf` accepts.
    """
    notes = []
    if "model_type" not in hf:
        notes.append(f"{_CONFIG_JSON} has no model_type; it was read as a GPT-2")
    positions = next((hf[name] for name in ("n_positions", *ALIASES["n_positions"]) if name in hf), None)
    if positions is None and hf.get("n_ctx") is not None:
        notes.append(f"{_CONFIG_JSON} has no n_positions, which transformers needs; n_ctx={hf['n_ctx']} was read")
    elif hf.get("n_ctx") not in (None, positions):
        notes.append(
            f"n_ctx={quoted(hf['n_ctx'])} differs from n_positions={quoted(positions)}, which decides, as in "
            "transformers; an export has n_ctx equal to n_positions"
        )
    ignored = [name for name in hf if name not in _KNOWN and is_ignored(name)]
    if ignored:
        shown = [f"{_shown(name)}={quoted(hf[name], limit=40)}" for name in ignored[:_MOST_SHOWN]]
        more = f" and {len(ignored) - _MOST_SHOWN} more" if len(ignored) > _MOST_SHOWN else ""
        notes.append(f"{_CONFIG_JSON} has fields that GPT-2 ignores, which are kept: {', '.join(shown)}{more}")
    return tuple(notes)


_CONFIG_JSON = "config.json"
_MOST_SHOWN = 20  # fields in one sentence

_HF_FIELDS = tuple(field.name for field in fields(GPT2Config) if field.name != "bias")

_KNOWN = {*_HF_FIELDS, *(alias for names in ALIASES.values() for alias in names), "n_ctx"}

_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")


def _foreign_model(hf: Mapping[str, Any]) -> list[str]:
    """Return the reasons why this is the configuration of another architecture."""
    architectures = hf.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        return [f"architectures={quoted(architectures)}: must be a list of names"]
    if "model_type" in hf:
        if hf["model_type"] == "gpt2":
            return []
        return [f"model_type={quoted(hf['model_type'])}: only 'gpt2' is supported"]
    if any(name.startswith("GPT2") for name in architectures):
        return []
    if not architectures and all(name in hf or (name == "n_positions" and "n_ctx" in hf) for name in _SIZES):
        return []
    return ['model_type is missing: add "model_type": "gpt2" if this is a GPT-2']


def _own_fields(hf: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the fields of `GPT2Config`, and an error for each setting whose names have different values."""
    values: dict[str, Any] = {"embd_pdrop": 0.1, "attn_pdrop": 0.1, "resid_pdrop": 0.1}
    problems = []
    for field in _HF_FIELDS:
        given = {name: hf[name] for name in (field, *ALIASES.get(field, ())) if name in hf}
        if any(value != next(iter(given.values())) for value in given.values()):
            spelled = ", ".join(f"{name}={quoted(value)}" for name, value in given.items())
            problems.append(f"{spelled}: these are aliases of one setting but have different values")
        elif given:
            values[field] = next(iter(given.values()))
        elif field == "n_positions" and hf.get("n_ctx") is not None:
            values[field] = hf["n_ctx"]
    return values, problems


def _unsupported_fields(hf: Mapping[str, Any]) -> list[str]:
    return [
        f"{_shown(name)}={quoted(value)}: {reason}"
        for name, value in hf.items()
        if name not in _KNOWN and (reason := unsupported(name, value))
    ]


def _shown(name: str) -> str:
    return name if name.isascii() and name.isidentifier() else quoted(name)


def _contradictions(hf: Mapping[str, Any], config: GPT2Config) -> list[str]:
    """Return an error for each field that states a property of the model under another name, with another value."""
    return [
        f"{name}={quoted(hf[name])}, but {attribute} is {getattr(config, attribute)!r}; remove {name}, which "
        "transformers' GPT-2 ignores, if it is wrong"
        for name, attribute in STATED.items()
        if hf.get(name) is not None and hf[name] != getattr(config, attribute)
    ]


_LONGEST_NAME = 256  # characters of a field name; longer ones would be slow to match and unreadable in a message
_LARGEST_SIZE = 2**31 - 1  # token ids and positions are int32
_MOST_LAYERS = 10_000  # ten times the deepest published transformer; limits the cost of a typo


def _wrong_types(config: GPT2Config) -> dict[str, str]:
    """Return field -> error for fields of the wrong type. A bool is not an int; an int is valid as a float."""
    problems = {}
    for field in fields(GPT2Config):
        value = getattr(config, field.name)
        expected = {"int": int, "int | None": int, "float": float, "bool": bool, "str": str}[str(field.type)]
        if value is None and field.type == "int | None":
            continue
        if expected is float and type(value) is int:
            continue
        if type(value) is not expected:
            problems[field.name] = f"{field.name}={quoted(value)}: must be {field.type}, not {type(value).__name__}"
    return problems


def _out_of_range(values: Mapping[str, Any]) -> list[str]:
    """Return the errors of the fields in `values`, which have the right types. Other fields are not checked."""
    problems = []
    for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner"):
        value = values.get(name)
        most = _MOST_LAYERS if name == "n_layer" else _LARGEST_SIZE
        if value is not None and not 1 <= value <= most:
            problems.append(f"{name}={quoted(value)}: must be between 1 and {most}")
    width, heads = values.get("n_embd", 0), values.get("n_head", 0)
    if min(width, heads) > 0 and width % heads:
        problems.append(f"n_embd={quoted(width)} is not divisible by n_head={quoted(heads)}")
    activation = values.get("activation_function", ACTIVATIONS[0])
    if activation not in ACTIVATIONS:
        problems.append(f"activation_function={quoted(activation)}: must be one of {', '.join(ACTIVATIONS)}")
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        if not 0 <= values.get(name, 0) < 1:
            problems.append(f"{name}={quoted(values[name])}: must be at least 0 and below 1")
    for name in ("layer_norm_epsilon", "initializer_range"):
        # The upper bound also rejects infinity, and integers that are too large for a float.
        if not 0 < values.get(name, 1) <= sys.float_info.max:
            problems.append(f"{name}={quoted(values[name])}: must be positive and finite")
    return problems


GPT2_SIZES: Mapping[str, GPT2Config] = {
    "gpt2": GPT2Config(),  # 124,439,808 parameters
    "gpt2-medium": GPT2Config(n_embd=1024, n_layer=24, n_head=16),  # 354,823,168
    "gpt2-large": GPT2Config(n_embd=1280, n_layer=36, n_head=20),  # 774,030,080
    "gpt2-xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),  # 1,557,611,200
}
"""The four models that OpenAI released, under their names on the Hugging Face hub."""
