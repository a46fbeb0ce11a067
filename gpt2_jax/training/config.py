"""The configuration of a training run: frozen dataclasses with one field per flag."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from bridge import GPT2Config
from bridge.errors import bullet_list, quoted
from gpt2_jax.choices import Implementation, Remat, obstacle
from gpt2_jax.lora.config import LoRAConfig
from gpt2_jax.training.errors import TrainingError
from gpt2_jax.training.validation import choice_problems, pattern_problem, range_problems, type_problems

TOKENIZER_OF_INIT_FROM = "init-from"
"""The value of `TrainConfig.tokenizer` for the tokenizer of the checkpoint in `init_from`, if it has one."""

_LORA = "lora_"
"""The prefix of the flags of `LoRAConfig`."""
_NAMED = re.compile(r"(?P<name>[A-Za-z][\w.-]{0,39})=(?P<path>.+)", re.ASCII | re.DOTALL)
_MESH = re.compile(r"[\w=, -]{1,100}", re.ASCII)


@dataclass(frozen=True)
class OptimizerConfig:
    """The update rule and its learning rate schedule. Steps are counted from 0."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw for all parameters; or muon for the layers' projections, with AdamW for all other parameters."""
    learning_rate: float = 6e-4
    """The highest learning rate, reached after the warm-up."""
    min_learning_rate: float = 6e-5
    """The learning rate at the end of the cosine or linear decay."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """The schedule after the warm-up: cosine (as in nanoGPT), wsd (constant, then a linear decay) or constant."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    decay_steps: int | None = None
    """The step at which the cosine ends; None means the last step."""
    decay_fraction: float = 0.2
    """For wsd: the fraction of all steps, at the end, over which the learning rate decays."""
    beta1: float = 0.9
    """Decay of AdamW's first moment."""
    beta2: float = 0.95
    """Decay of AdamW's second moment."""
    epsilon: float = 1e-8
    """Added to AdamW's denominator."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate. Applies to projections and embeddings, not to biases and
    LayerNorms."""
    max_grad_norm: float | None = 1.0
    """Clip the global gradient norm to this value, as torch does; None disables clipping."""
    layer_decay: float = 1.0
    """Multiply the learning rate of each layer by this factor relative to the layer above it (layer-wise learning rate
    decay). The final norm and an untied head have the full rate, and the embeddings the lowest."""
    muon_learning_rate: float = 0.02
    """For muon: the highest learning rate of the layers' projections, under the same schedule."""
    muon_momentum: float = 0.95
    """For muon: decay of the momentum."""
    muon_weight_decay: float = 0.0
    """For muon: weight decay of the layers' projections, multiplied by their learning rate."""


@dataclass(frozen=True)
class TrainConfig:
    """The configuration of a training run: model, optimizer, data, computation and reports."""

    preset: str = "nano"
    """The preset that sets the default of every other flag."""
    model: GPT2Config = field(default_factory=GPT2Config)
    """Sizes of the model. The tokenizer determines the vocabulary; with --init-from SRC, SRC determines all sizes."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The update rule."""
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(rank=0))
    """The adapter, if one is trained."""
    freeze: str | None = None
    """A regular expression. Parameters are not trained if it matches their whole path in the Flax tree, or that of a
    module that contains them: 'wte|wpe|h_[0-3]', 'h_.*/attn', '.*/bias'."""

    data: str = "stdlib"
    """A text file, a directory or glob of text, `stdlib` (Python's own); records: .jsonl, .json, .csv, .tsv, .parquet,
    or a directory that `datasets` saved; or token files: nanoGPT's .bin, llm.c's shards, .npy. Text and records may be
    compressed: .gz, .xz, .zst. A .toml file describes a mixture of these, each with a weight. OWNER/NAME is a data set
    of the Hugging Face hub."""
    validation_data: tuple[str, ...] = ()
    """The validation text or tokens, if they are not part of --data: one path, or several sets as NAME=PATH. The first
    one decides which checkpoint is best; metrics.jsonl has the loss of each."""
    validation_fraction: float = 0.1
    """The fraction of --data, at its end, that is used for validation."""
    tokenizer: str = "bpe"
    """gpt2, bytes, characters, bpe (trained on the data, to --vocab-size), a directory with a tokenizer, or none for
    token files, whose ids must be below --vocab-size. With --init-from SRC the default is init-from, SRC's tokenizer.
    If SRC has none, another may be given."""
    special_tokens: Literal["match", "as-text", "error"] = "match"
    """An added token, such as <|endoftext|>, in the text of --data is one token (match), text like any other (as-text),
    or an error."""
    text_field: str | None = None
    """The field of each record of --data that has its text (default: text)."""
    prompt_field: str | None = None
    """The field with the prompt, which does not count in the loss (default: prompt)."""
    completion_field: str | None = None
    """The field with the completion of the prompt (default: completion)."""
    messages_field: str | None = None
    """The field with the messages of a chat. Only the assistant's count in the loss (default: messages)."""
    skip_bad_records: bool = False
    """Leave out and count the records that cannot be used, such as completions that are longer than --seq-len. By
    default the first one is an error."""
    examples: Literal["auto", "stream", "documents", "packed"] = "auto"
    """stream: windows of one long text; documents: each document is one padded, masked example; packed: several
    documents fill one sequence, and tokens attend only to their own document; auto: documents for records with
    completions or messages, and stream for all others."""
    init_from: str | None = None
    """Start from the weights of this checkpoint: any source that `gpt2 inspect` reads."""
    source_activation: str | None = None
    """The activation of a nanoGPT file in --init-from that does not state it: gelu, or gelu_new if nanoGPT's code from
    before June 14, 2023, wrote the file."""
    base: str | None = None
    """For a LoRA adapter of PEFT in --init-from: the model that it changes. The adapter is merged into it."""
    drop_extra_heads: bool = False
    """Leave out the tensors of heads for other tasks in --init-from, such as classification. By default they are an
    error."""

    max_steps: int = 2000
    """The number of optimizer steps of the whole run."""
    early_stopping: int | None = None
    """End the run after this many evaluations in a row without a new lowest validation loss."""
    batch_size: int = 16
    """Sequences per optimizer step."""
    seq_len: int = 256
    """Tokens per sequence, at most n_positions."""
    num_microbatches: int = 1
    """Split each batch into this many microbatches, which run one after the other, to save memory."""
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
    """The activations that are recomputed in the backward pass, to save memory. none keeps all; dots keeps the outputs
    of matrix products and attention; full keeps only each layer's input."""
    attention: Implementation = "auto"
    """The implementation of attention; auto selects the fastest for the device, dtype and sequence length."""
    vocab_multiple: int = 1
    """Pad the vocabulary's rows to a multiple of this; 128 suits GPUs and TPUs."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, and evaluate and export it. The decay after t updates is
    min(this, (1 + t) / (10 + t)), so that the initial weights do not dominate the average of a short run."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What to do when the loss or a gradient is NaN or infinite. stop ends the run; skip discards the update, counts
    it, and continues with the next batch."""
    deterministic: bool = False
    """Make runs bitwise reproducible: on GPU with kernels that add in a fixed order, on CPU with one thread. Slower."""

    eval_every: int = 250
    """Steps between evaluations on the validation data. The last step is always evaluated."""
    eval_batches: int | None = 200
    """Batches per evaluation, evenly spaced over the validation data; None uses all of it."""
    sample_tokens: int = 128
    """Tokens of the sample that is printed at evaluations; 0 prints none."""
    sample_prompt: str = "\n"
    """The prompt of the sample."""
    log_every: int = 10
    """Steps between lines in metrics.jsonl."""
    checkpoint_every: int = 250
    """Steps between checkpoints. The last step is always saved."""
    keep_last: int = 2
    """The number of newest checkpoints kept, besides the best one."""
    tensorboard: bool = False
    """Also write TensorBoard events to RUN/tensorboard (extra `tensorboard`)."""
    wandb: str | None = None
    """Also log to this Weights & Biases project (extra `wandb`)."""

    def __post_init__(self) -> None:
        sets: Any = self.validation_data
        if sets is None or isinstance(sets, str):  # as in earlier versions
            object.__setattr__(self, "validation_data", () if sets is None else (sets,))
        if problems := list(_problems(self)):
            raise TrainingError("the training configuration is invalid:\n" + bullet_list(problems))

    @property
    def is_partial(self) -> bool:
        """Whether some weights are frozen, by an adapter or by `freeze`."""
        return self.lora.rank > 0 or self.freeze is not None


PATH_FIELDS = frozenset({"data", "validation_data", "init_from", "base"})
"""Fields that are paths. They may differ between the machines of one run."""

CHANGEABLE_FIELDS = frozenset(
    {
        "data",
        "validation_data",
        "eval_every",
        "eval_batches",
        "early_stopping",
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
    lora = {_LORA + name: value for name, value in values.pop("lora").items()}
    return {**values.pop("model"), **values.pop("optimizer"), **lora, **values}


def from_flat(values: Mapping[str, Any]) -> TrainConfig:
    """The inverse of `flat`. Raises `TrainingError` for missing or unknown names and invalid values."""
    if not isinstance(values, Mapping):
        raise TrainingError("the configuration must be an object")
    known = flat(TrainConfig())
    problems = [f"{quoted(name)} is missing" for name in known if name not in values]
    problems += [f"{quoted(name)} is unknown" for name in values if name not in known]
    if problems:
        raise TrainingError("the configuration has other fields than this version:\n" + bullet_list(problems))
    rest = {**values}
    if isinstance(sets := rest["validation_data"], list):
        rest["validation_data"] = tuple(sets)
    model = GPT2Config(**{f.name: rest.pop(f.name) for f in dataclasses.fields(GPT2Config)})
    optimizer = OptimizerConfig(**{f.name: rest.pop(f.name) for f in dataclasses.fields(OptimizerConfig)})
    lora = LoRAConfig(**{f.name: rest.pop(_LORA + f.name) for f in dataclasses.fields(LoRAConfig)})
    return TrainConfig(model=model, optimizer=optimizer, lora=lora, **rest)


def validation_sets(entries: Sequence[str]) -> dict[str, str]:
    """Return the path of each validation set by its name, in order. A single set may have no name, which is ""."""
    named = {}
    for entry in entries:
        match = _NAMED.fullmatch(entry)
        named[match["name"] if match else ""] = match["path"] if match else entry
    return named


def _problems(config: TrainConfig) -> Iterator[str]:
    parts = (("", config), ("", config.optimizer), (_LORA, config.lora))
    if wrong := [prefix + problem for prefix, part in parts for problem in type_problems(part)]:
        yield from wrong
        return  # comparing a non-number with a number would raise
    for prefix, part in parts:
        yield from (prefix + problem for problem in (*choice_problems(part), *range_problems(part)))
    yield from _combination_problems(config)


def _combination_problems(c: TrainConfig) -> Iterator[str]:
    """Yield the fields that do not fit each other."""
    o = c.optimizer
    if not _MESH.fullmatch(c.mesh):
        yield f"mesh={quoted(c.mesh)}: must be like data=2,fsdp=4,tensor=1"
    if c.num_microbatches >= 1 and c.batch_size % c.num_microbatches:
        yield f"num_microbatches={c.num_microbatches}: does not divide batch_size={c.batch_size}"
    if c.source_activation is not None and c.init_from is None:
        yield f"source_activation={quoted(c.source_activation)}: is only for --init-from"
    if c.base is not None and c.init_from is None:
        yield f"base={quoted(c.base)}: is only for --init-from"
    if c.drop_extra_heads and c.init_from is None:
        yield "drop_extra_heads: is only for --init-from"
    if c.tokenizer == TOKENIZER_OF_INIT_FROM and c.init_from is None:
        yield f"tokenizer={c.tokenizer}: needs init_from, which is not given"
    if o.decay_steps is not None and o.decay_steps <= o.warmup_steps:
        yield f"decay_steps={o.decay_steps}: must be above warmup_steps={o.warmup_steps}"
    yield from _partial_problems(c)
    sets = validation_sets(c.validation_data)
    if len(sets) < len(c.validation_data) or ("" in sets and len(sets) > 1):
        yield f"validation_data={quoted(list(c.validation_data))}: several sets need different names, as NAME=PATH"
    fields = ("text_field", "completion_field", "messages_field")
    kinds = [f for f in fields if getattr(c, f) or (f == "completion_field" and c.prompt_field)]
    if len(kinds) > 1:
        yield f"{', '.join(kinds)}: name the fields of one kind of records"
    yield from _attention_problems(c)


def _partial_problems(c: TrainConfig) -> Iterator[str]:
    """Yield the problems of the settings that train only a part of the weights."""
    if c.lora.unknown_targets:
        yield f"lora_targets={quoted(c.lora.targets)}: must name c_attn, attn.c_proj, c_fc or mlp.c_proj, or all-linear"
    if c.lora.rank and c.freeze is not None:
        yield f"freeze={quoted(c.freeze)}: has no effect with lora_rank, which freezes all weights"
    if c.lora.rank and c.optimizer.optimizer == "muon":
        yield "optimizer=muon: updates projections, which lora_rank freezes; use adamw"
    if c.freeze is not None and (problem := pattern_problem(c.freeze)):
        yield f"freeze={quoted(c.freeze)}: {problem}"


def _attention_problems(c: TrainConfig) -> Iterator[str]:
    """Yield why the chosen attention cannot run this configuration. `auto` and `xla` can run every one."""
    if c.attention in ("auto", "xla") or c.attention not in get_args(Implementation):
        return
    if problem := obstacle(c.attention, c.dtype, c.seq_len, c.model.head_size, has_segments=c.examples == "packed"):
        yield f"attention={c.attention}: {problem}"
    if c.model.attn_pdrop > 0 or c.examples == "documents":
        yield f"attention={c.attention}: does not support attn_pdrop above 0 or --examples documents; xla does"
