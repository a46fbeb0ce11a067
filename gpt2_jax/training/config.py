"""The configuration of a training run: frozen dataclasses with one field per flag, and presets as literal values."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from bridge import GPT2_SIZES, BridgeError, GPT2Config
from bridge.errors import bullet_list, quoted
from gpt2_jax.choices import Implementation, Remat, obstacle

TOKENIZER_OF_INIT_FROM = "init-from"
"""The value of `TrainConfig.tokenizer` for the tokenizer of the checkpoint in `init_from`, if it has one."""


class TrainingError(BridgeError):
    """A training run cannot be started or continued as asked; the message names the field."""


class NonFiniteLoss(TrainingError):
    """A loss, a gradient or a weight is infinite or NaN; the message names the step."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine's memory, or the device's, was too small."""
    from jax.errors import JaxRuntimeError  # not at the top, because `gpt2 train --help` must not wait for JAX

    return isinstance(error, MemoryError) or (isinstance(error, JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error))


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its schedule. Steps are counted from 0."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw; or muon for the layers' projections, with AdamW for the rest."""
    learning_rate: float = 6e-4
    """The highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 6e-5
    """What the cosine and the linear decay come down to."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: a cosine as in nanoGPT; constant, then a linear decay; or constant."""
    warmup_steps: int = 100
    """The learning rate rises linearly over these."""
    decay_steps: int | None = None
    """The cosine ends here; None means at the last step."""
    decay_fraction: float = 0.2
    """For wsd: the part of all steps, at the end, in which the learning rate falls."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Multiplied by the learning rate. Applies to projections and embeddings, never to biases and LayerNorms."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this, as torch does; None disables clipping."""
    muon_learning_rate: float = 0.02
    """For muon: the highest learning rate of the layers' projections, under the same schedule."""
    muon_momentum: float = 0.95
    """For muon: decay of its momentum."""
    muon_weight_decay: float = 0.0
    """For muon: weight decay of the layers' projections, multiplied by its learning rate."""


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training run: model, data, optimizer and reports."""

    preset: str = "nano"
    """The preset that sets the default of every other flag."""
    model: GPT2Config = field(default_factory=GPT2Config)
    """Sizes of the model. The tokenizer determines the vocabulary; with --init-from SRC, SRC determines all sizes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The update rule."""

    data: str = "stdlib"
    """A text file, a directory or glob of text, `stdlib` (Python's own), or token files: nanoGPT's .bin,
    llm.c's shards, .npy."""
    validation_data: str | None = None
    """The validation text or tokens, if they are not a part of --data."""
    validation_fraction: float = 0.1
    """The fraction of --data, at its end, that is used for validation."""
    tokenizer: str = "bpe"
    """gpt2, bytes, characters, bpe (trained on the data, to --vocab-size), a directory with a tokenizer, or none for
    token files, whose ids must be below --vocab-size. With --init-from SRC the default is init-from, SRC's tokenizer.
    If SRC has none, another may be given."""
    examples: Literal["stream", "documents"] = "stream"
    """stream: windows of one long text; documents: each document one padded, masked example."""
    init_from: str | None = None
    """Start from the weights of this checkpoint: any source that `gpt2 inspect` reads."""
    source_activation: str | None = None
    """The activation of a nanoGPT file in --init-from that does not state it: gelu, or gelu_new if nanoGPT's code from
    before June 14, 2023, wrote the file."""

    max_steps: int = 2000
    """Updates of the parameters."""
    batch_size: int = 16
    """Sequences in one step."""
    seq_len: int = 256
    """Tokens in a sequence, at most n_positions."""
    num_microbatches: int = 1
    """Split each batch into this many microbatches, run one after the other, to save memory."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, and dropout."""

    mesh: str = "data=-1"
    """The device mesh: data=..,fsdp=..,tensor=.., where omitted axes are 1, and -1 means all remaining devices. data
    splits the rows of the batch; fsdp splits rows and weights; tensor splits heads and columns."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """The dtype of the computation. Parameters and optimizer state stay float32."""
    scan: bool = True
    """Compile one layer and loop over it; --no-scan unrolls all of them."""
    remat: Remat = "dots"
    """The activations of a layer kept for the backward pass: all; outputs of matmuls and attention; or its input."""
    attention: Implementation = "auto"
    """The implementation of attention; auto takes the fast one for the device, dtype and length."""
    vocab_multiple: int = 1
    """Pad the vocabulary's rows to a multiple of this; 128 suits GPUs and TPUs."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate and export it. The decay after t updates is
    min(this, (1 + t) / (10 + t)), so that the initial weights do not dominate the average of a short run."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite. stop ends the run; skip discards the update, counts
    it, and continues with the next batch."""
    deterministic: bool = False
    """Bitwise reproducible runs: on GPU with kernels that add in a fixed order, on CPU with one thread. Slower."""

    eval_every: int = 250
    """Steps between evaluations on the validation data; there is one after the last step too."""
    eval_batches: int | None = 200
    """Batches per evaluation, evenly spaced over the validation data; None uses all of it."""
    sample_tokens: int = 128
    """Tokens of the sample that is printed at evaluations; 0 prints none."""
    sample_prompt: str = "\n"
    """The prompt of the sample."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints; there is one after the last step too."""
    keep_last: int = 2
    """Checkpoints kept besides the best, newest first."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard (extra `tensorboard`)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra `wandb`)."""

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise TrainingError("this run cannot be trained:\n" + bullet_list(problems))


PLACES = frozenset({"data", "validation_data", "init_from"})
"""Fields that are paths."""

FREE = frozenset(
    {
        "data",
        "validation_data",
        "eval_every",
        "eval_batches",
        "sample_tokens",
        "sample_prompt",
        "log_every",
        "checkpoint_every",
        "keep_last",
        "tensorboard",
        "wandb",
        "mesh",
        "non_finite",
        "deterministic",
    }
)
"""Fields that a resumed run may change. They affect reports, retention, paths, devices, rounding, and the handling of
non-finite values, but not the computation itself."""


def flat(config: TrainConfig) -> dict[str, Any]:
    """Return every field by the name of its flag, with nested fields at the top level."""
    values = dataclasses.asdict(config)
    return {**values.pop("model"), **values.pop("optimizer"), **values}


_ADDED = ("source_activation",)
"""Fields that earlier versions did not store. Their runs used the default."""


def from_flat(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `flat`. Raises `TrainingError` for unknown names and invalid values."""
    if not isinstance(values, Mapping):
        raise TrainingError("the run's configuration was written by another version: it must be an object")
    known = flat(TrainConfig())
    values = {**{name: known[name] for name in _ADDED}, **values}
    problems = [f"{quoted(name)} is missing" for name in known if name not in values]
    problems += [f"{quoted(name)} is unknown" for name in values if name not in known]
    if problems:
        raise TrainingError("the run's configuration was written by another version:\n" + bullet_list(problems))
    rest = {**values}
    model = GPT2Config(**{f.name: rest.pop(f.name) for f in dataclasses.fields(GPT2Config)})
    optimizer = OptimizerConfig(**{f.name: rest.pop(f.name) for f in dataclasses.fields(OptimizerConfig)})
    return TrainConfig(model=model, optimizer=optimizer, **rest)


_COUNTED_IN_STEPS = frozenset(
    {"max_steps", "eval_every", "log_every", "checkpoint_every", "warmup_steps", "decay_steps"}
)
_TYPE_NAMES = {int: "a whole number of 64 bits", float: "a number", bool: "true or false", NoneType: "none"}
_MESH = re.compile(r"[\w=, -]{1,100}", re.ASCII)


def _problems(c: TrainConfig) -> Iterator[str]:
    o = c.optimizer
    if wrong := [*_wrong_types(c), *_wrong_types(o)]:
        yield from wrong
        return  # comparing a non-number with a number would raise
    yield from _unknown_choices(c)
    yield from _unknown_choices(o)
    at_least_one = (
        "max_steps",
        "batch_size",
        "seq_len",
        "num_microbatches",
        "eval_every",
        "log_every",
        "checkpoint_every",
    )
    for name in (*at_least_one, "vocab_multiple", "keep_last"):
        if getattr(c, name) < 1:
            yield f"{name}={getattr(c, name)}: must be at least 1"
    for name, count in {**vars(c), **vars(o)}.items():
        if type(count) is int and count >= 2**31 and name != "seed":
            counted = ", as steps are counted in 32 bits" if name in _COUNTED_IN_STEPS else ""
            yield f"{name}={count}: must be below {2**31}{counted}"
    if not _MESH.fullmatch(c.mesh):
        yield f"mesh={quoted(c.mesh)}: must be like data=2,fsdp=4,tensor=1"
    if c.num_microbatches >= 1 and c.batch_size % c.num_microbatches:
        yield f"num_microbatches={c.num_microbatches}: does not divide batch_size={c.batch_size}"
    if c.eval_batches is not None and c.eval_batches < 1:
        yield f"eval_batches={c.eval_batches}: must be at least 1"
    if not 0 < c.validation_fraction < 1:
        yield f"validation_fraction={c.validation_fraction}: must be between 0 and 1"
    if not 0 <= c.seed < 2**32:
        yield f"seed={c.seed}: must be between 0 and {2**32 - 1}"
    if c.source_activation is not None and c.init_from is None:
        yield f"source_activation={quoted(c.source_activation)}: it is only for --init-from"
    if c.sample_tokens < 0:
        yield f"sample_tokens={c.sample_tokens}: must not be negative"
    if c.tokenizer == TOKENIZER_OF_INIT_FROM and c.init_from is None:
        yield f"tokenizer={c.tokenizer}: needs init_from, which is not given"
    yield from _attention_problems(c)
    if c.ema_decay is not None and not 0 < c.ema_decay < 1:
        yield f"ema_decay={c.ema_decay}: must be between 0 and 1"
    for name in ("learning_rate", "epsilon", "muon_learning_rate"):
        if not (math.isfinite(getattr(o, name)) and getattr(o, name) > 0):
            yield f"{name}={getattr(o, name)}: must be positive"
    for name in ("min_learning_rate", "weight_decay", "muon_weight_decay", "warmup_steps"):
        if not (math.isfinite(getattr(o, name)) and getattr(o, name) >= 0):
            yield f"{name}={getattr(o, name)}: must not be negative"
    for name in ("beta1", "beta2", "muon_momentum"):
        if not 0 <= getattr(o, name) < 1:
            yield f"{name}={getattr(o, name)}: must be at least 0 and below 1"
    if not 0 < o.decay_fraction <= 1:
        yield f"decay_fraction={o.decay_fraction}: must be above 0 and at most 1"
    if o.max_grad_norm is not None and not (math.isfinite(o.max_grad_norm) and o.max_grad_norm > 0):
        yield f"max_grad_norm={o.max_grad_norm}: must be positive, or None"
    if o.decay_steps is not None and o.decay_steps <= o.warmup_steps:
        yield f"decay_steps={o.decay_steps}: must be above warmup_steps={o.warmup_steps}"


def _wrong_types(part: TrainConfig | OptimizerConfig) -> Iterator[str]:
    """Yield the fields that do not have their declared type. A bool is no int, an int is a float, NUL is invalid."""
    for name, hint in get_type_hints(type(part)).items():
        value, allowed = getattr(part, name), get_args(hint) if isinstance(hint, UnionType) else (hint,)
        if not any(_is_of_type(value, one) for one in allowed):
            yield f"{name}={_shown(value)}: must be {' or '.join(_TYPE_NAMES.get(one, 'text') for one in allowed)}"
        elif isinstance(value, str) and "\0" in value:
            yield f"{name}={_shown(value)}: must not have a NUL character"


def _is_of_type(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return isinstance(value, str)
    if type(value) is int and hint in (int, float):
        return -(2**63) <= value < 2**63
    if hint in (GPT2Config, OptimizerConfig):
        return isinstance(value, hint)
    return type(value) is hint


def _shown(value: Any) -> str:
    """Format a value for a message: text quoted and truncated, a list or an object as its type."""
    if isinstance(value, list | dict):
        return type(value).__name__
    return quoted(value) if isinstance(value, str) else quoted(value)[1:-1]


def _attention_problems(c: TrainConfig) -> Iterator[str]:
    """Where an implementation is named that cannot run this; `auto` and `xla` take everything."""
    if c.attention in ("auto", "xla") or c.attention not in get_args(Implementation):
        return
    if problem := obstacle(c.attention, c.dtype, c.seq_len, c.model.head_size):
        yield f"attention={c.attention}: {problem}"
    if c.model.attn_pdrop > 0 or c.examples == "documents":
        yield f"attention={c.attention}: cannot take attn_pdrop above 0 or --examples documents, which xla does"


def _unknown_choices(part: TrainConfig | OptimizerConfig) -> Iterator[str]:
    for name, hint in get_type_hints(type(part)).items():
        if get_origin(hint) is Literal and getattr(part, name) not in get_args(hint):
            yield f"{name}={_shown(getattr(part, name))}: must be one of {', '.join(get_args(hint))}"


_GPT2_OPTIMIZER = OptimizerConfig(warmup_steps=2000)  # 6e-4, 0.9, 0.95, 0.1: nanoGPT's train_gpt2.py

PRESETS: Mapping[str, TrainConfig] = {
    # A few minutes on two CPU cores, on text that every machine has.
    "nano": TrainConfig(
        preset="nano",
        model=GPT2Config(vocab_size=1024, n_positions=256, n_embd=128, n_layer=4, n_head=4),
        optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, beta2=0.99),
        batch_size=16,
        seq_len=128,
    ),
    # From somebody's weights, with --init-from.
    "finetune": TrainConfig(
        preset="finetune",
        optimizer=OptimizerConfig(learning_rate=5e-5, min_learning_rate=0.0, warmup_steps=20),
        tokenizer="gpt2",
        max_steps=500,
        batch_size=8,
        eval_every=100,
        checkpoint_every=100,
    ),
    # nanoGPT's configuration for a laptop without a GPU (its README, "I only have a macbook").
    "shakespeare-char": TrainConfig(
        preset="shakespeare-char",
        model=GPT2Config(vocab_size=65, n_positions=64, n_embd=128, n_layer=4, n_head=4, bias=False),
        optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, beta2=0.99),
        tokenizer="characters",
        batch_size=12,
        seq_len=64,
        scan=False,
        eval_batches=None,
    ),
    # What the package brings along (bridge/bundled): under 8 MB in float32, any text can be encoded.
    "shakespeare": TrainConfig(
        preset="shakespeare",
        model=GPT2Config(
            vocab_size=1024,
            n_positions=256,
            n_embd=160,
            n_layer=5,
            n_head=4,
            embd_pdrop=0.1,
            resid_pdrop=0.1,
        ),
        optimizer=OptimizerConfig(
            optimizer="muon", learning_rate=2e-3, min_learning_rate=1e-4, beta2=0.99, muon_weight_decay=0.1
        ),
        max_steps=1200,
        batch_size=16,
        seq_len=256,
        eval_batches=None,
    ),
    # nanoGPT's config/train_shakespeare_char.py.
    "shakespeare-char-gpu": TrainConfig(
        preset="shakespeare-char-gpu",
        model=GPT2Config(
            vocab_size=65,
            n_positions=256,
            n_embd=384,
            n_layer=6,
            n_head=6,
            bias=False,
            embd_pdrop=0.2,
            attn_pdrop=0.2,
            resid_pdrop=0.2,
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, min_learning_rate=1e-4, beta2=0.99),
        tokenizer="characters",
        max_steps=5000,
        batch_size=64,
        seq_len=256,
        eval_batches=None,
    ),
    # The four sizes, with nanoGPT's recipe for reproducing the smallest: 0.5M tokens a step.
    **{
        name: TrainConfig(
            preset=name,
            model=size,
            optimizer=_GPT2_OPTIMIZER,
            tokenizer="gpt2",
            max_steps=600_000,
            batch_size=480,
            seq_len=1024,
            num_microbatches=40,
            dtype="bfloat16",
            vocab_multiple=128,
            eval_every=1000,
            checkpoint_every=1000,
        )
        for name, size in GPT2_SIZES.items()
    },
}
"""Name -> recipe."""
