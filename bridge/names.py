"""Names of the tensors in a PyTorch state_dict: canonical names, prefixes of wrappers, and heads for other tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from bridge.errors import ConversionError, bullet_list, quoted

_WRAPPERS = {
    "module",  # torch DDP, DeepSpeed
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",  # torch FSDP
    "_forward_module",  # Lightning Fabric
    "_module",  # Opacus
    "model",  # an attribute of many wrappers, for example of Lightning modules
    "pretrained_model",  # TRL, models with a value head
    "base_model",  # PEFT, which prepends base_model.model
}
"""Name parts that wrappers prepend, in any combination."""
_INNER_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Name parts that wrappers of single layers insert at any depth."""

_EMBEDDING = "wte.weight"
_OF_GPT2 = re.compile(r"(wte|wpe|h|ln_f|lm_head)\..*", re.DOTALL)
_OF_EXTRA_HEAD = re.compile(
    r"(multiple_choice_head|score|classifier|qa_outputs|v_head|sequence_summary|summary)\..+", re.DOTALL
)
"""transformers' heads for other tasks, and TRL's value head. Each has one or more tensors under its name."""

# Names of a LayerNorm's parameters in TensorFlow and pytorch-pretrained-bert, the predecessor of transformers.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}
# Causal-mask buffers, which old versions of transformers saved with the weights.
_BUFFER = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")


def canonical_names(names: Iterable[str]) -> dict[str, str]:
    """Return canonical name -> name in `names`, without prefixes of wrappers and without mask buffers.

    `transformer.h.0.attn.c_attn.weight` and `module._orig_mod.h.0.attn.c_attn.weight` both become
    `h.0.attn.c_attn.weight`. `gamma` and `beta` of LayerNorms become `weight` and `bias`, and DialoGPT's
    `lm_head.decoder.weight` becomes `lm_head.weight`.

    >>> canonical_names(["model.transformer.wte.weight", "model.lm_head.weight"])
    {'wte.weight': 'model.transformer.wte.weight', 'lm_head.weight': 'model.lm_head.weight'}

    Raises `ConversionError` if two names have the same canonical name, or if only some names have a prefix.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        canonical = _canonical(name)
        if not _BUFFER.fullmatch(canonical):
            found.setdefault(canonical, []).append(name)
    clashes = [
        f"{quoted(canonical)} is the canonical name of {len(given)} tensors: {', '.join(map(quoted, given))}"
        for canonical, given in found.items()
        if len(given) > 1
    ]
    if clashes:
        raise ConversionError("several tensors have the same canonical name:\n" + bullet_list(clashes))
    _require_one_prefix(name for canonical, [name] in found.items() if _OF_GPT2.fullmatch(canonical))
    return {canonical: given[0] for canonical, given in found.items()}


def wrapper_prefix(names: Iterable[str]) -> str:
    """Return the prefix of wrappers, such as `model.`, that the names of GPT-2's parameters have, or an empty string.

    The names must be those that `canonical_names` accepts.
    """
    return next((_prefix(name) for name in names if _OF_GPT2.fullmatch(_canonical(name))), "")


def unknown_prefix(names: Iterable[str]) -> str:
    """Return a prefix of the token embedding's name that no known wrapper adds, or an empty string."""
    unknown = (name for name in names if _canonical(name) != _EMBEDDING)
    return next((name.removesuffix(_EMBEDDING) for name in unknown if name.endswith(f".{_EMBEDDING}")), "")


def extra_heads(names: Iterable[str]) -> list[str]:
    """Return the names of the tensors that belong to heads for other tasks, such as classification."""
    return [name for name in names if is_of_extra_head(_canonical(name))]


def is_of_extra_head(canonical: str) -> bool:
    """Whether a tensor with this canonical name belongs to a head for another task."""
    return _OF_EXTRA_HEAD.fullmatch(canonical) is not None


def not_a_parameter(name: str, *, is_head: bool) -> str:
    """Return the error for a tensor that the language model does not have.

    Args:
        is_head: whether it belongs to a head for another task, which can be left out.
    """
    leave_out = (
        " but of a head for another task; --drop-extra-heads, or bridge.load(..., drop_extra_heads=True), leaves it "
        "out (bridge.load_classifier and `gpt2 verify` read a classifier with its head)"
    )
    return f"{quoted(name)} is not a parameter of this model" + (leave_out if is_head else "")


def _prefix(name: str) -> str:
    """Return the leading parts of a name that belong to wrappers, each with its dot."""
    prefix = ""
    for part in name.split("."):
        if part not in _WRAPPERS:
            break
        prefix += f"{part}."
    return prefix


def _canonical(name: str) -> str:
    parts = [part for part in f"{name}."[len(_prefix(name)) : -1].split(".") if part not in _INNER_WRAPPERS]
    if parts[:1] == ["transformer"]:
        parts = parts[1:]
    if len(parts) > 1 and parts[-2].startswith("ln_"):
        parts[-1] = _OLD_NAMES.get(parts[-1], parts[-1])
    if parts == ["lm_head", "decoder", "weight"]:
        parts = ["lm_head", "weight"]
    return ".".join(parts)


def _require_one_prefix(names: Iterable[str]) -> None:
    """Raise `ConversionError` if names have different prefixes: they may belong to different models."""
    examples: dict[str, str] = {}
    for name in names:
        examples.setdefault(_prefix(name), name)
    if len(examples) > 1:
        listed = [f"{quoted(name)} has {quoted(p) if p else 'no prefix'}" for p, name in examples.items()]
        raise ConversionError(
            "the names of the tensors have different prefixes; save the state_dict of one model, or rename the "
            "tensors:\n" + bullet_list(listed)
        )
