"""What transformers computes from a checkpoint: logits, gradients, generated ids, logits of classes, and its tokenizer.

transformers reads copies of the small files beside the weights. The copies have passed the checks of
`bridge.storage.companions`: they are regular files of limited size.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from bridge import Checkpoint, SequenceClassifier
from bridge.checkpoint import GENERATION_CONFIG
from bridge.errors import quoted
from bridge.formats.directory import CONFIG, companions_of, copy_companions, write_config
from bridge.formats.huggingface import NAME as HUGGINGFACE
from bridge.tokenizers.loading import VOCABULARY_FILES
from bridge.tokenizers.readers.nanogpt import META
from gpt2_torch.arrays import tensor_from_array
from gpt2_torch.ops.cross_entropy import next_token_loss

NAME = "transformers"


class UnavailableError(Exception):
    """transformers is not installed, or cannot read or run a checkpoint. The message is the reason."""


def is_installed() -> bool:
    return importlib.util.find_spec("transformers") is not None


def require_model(checkpoint: Checkpoint) -> None:
    """Raise `UnavailableError` if transformers does not have this model."""
    _require_installed()
    if not checkpoint.config.bias:
        raise UnavailableError("its GPT-2 always has biases; this model has none")


def logits(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits [B, T, V] in float64, computed in `dtype`."""
    with torch.inference_mode():
        return _model(checkpoint, dtype)(torch.from_numpy(ids)).logits.double().numpy()


def gradients(checkpoint: Checkpoint, ids: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """Gradients of the next-token loss by canonical parameter name, computed in `dtype`."""
    model, tokens = _model(checkpoint, dtype), torch.from_numpy(ids)
    next_token_loss(model(tokens).logits, tokens).backward()
    return {name.removeprefix("transformer."): p.grad.numpy() for name, p in model.named_parameters()}


def class_logits(classifier: SequenceClassifier, ids: np.ndarray, dtype: str) -> np.ndarray:
    """Logits of the classes [B, C] in float64, computed in `dtype`."""
    from transformers import GPT2ForSequenceClassification

    labels = {"num_labels": classifier.num_labels, "pad_token_id": classifier.pad_token_id}
    config = _config(classifier.checkpoint, dtype, **labels)
    with torch.device("meta"):
        model = GPT2ForSequenceClassification(config)
    tensors = {**_tensors(classifier.checkpoint), "score.weight": tensor_from_array(classifier.score.read())}
    model.load_state_dict(tensors, assign=True)
    with torch.inference_mode():
        return model.to(getattr(torch, dtype)).eval()(torch.from_numpy(ids)).logits.double().numpy()


def tokenizer(checkpoint: Checkpoint) -> Any:
    """transformers' tokenizer of the files beside the weights.

    Raises `UnavailableError` if there are no files, or if transformers cannot read them.
    """
    _require_installed()
    if not {*companions_of(checkpoint)} & {*VOCABULARY_FILES}:
        raise UnavailableError("the tokenizer is not in files that transformers reads")
    with _quietly("cannot read the tokenizer"), _copied_files(checkpoint) as directory:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)


def encode(tokenizer: Any, text: str) -> list[int]:
    """The ids of a text with the default settings. Raises `UnavailableError` if transformers cannot encode it."""
    with _quietly("cannot encode the text"):
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


def generation_settings(checkpoint: Checkpoint) -> Any:
    """The settings that `GPT2LMHeadModel.from_pretrained` gives the model: a `transformers.GenerationConfig`.

    Raises `UnavailableError` if transformers does not accept them.
    """
    _require_installed()
    with _quietly("cannot read the generation settings"), _copied_files(checkpoint) as directory:
        from transformers import GenerationConfig

        if (directory / GENERATION_CONFIG).exists():
            return GenerationConfig.from_pretrained(directory)
        return GenerationConfig.from_pretrained(directory, config_file_name=CONFIG, _from_model_config=True)


def generate(checkpoint: Checkpoint, prompts: np.ndarray, settings: Any, **overrides: Any) -> list[list[int]]:
    """The new ids for prompts [B, T], up to and including the first end-of-sequence token, computed in float64.

    Args:
        settings: from `generation_settings`.
        **overrides: arguments of transformers' `generate`; `eos_token_id` is a tuple.

    Raises `UnavailableError` if transformers cannot generate with these settings.
    """
    ends = overrides["eos_token_id"]
    overrides["eos_token_id"] = [*ends] or None
    with _quietly("cannot generate"):
        model = _model(checkpoint, "float64")
        model.generation_config = settings
        ids = torch.from_numpy(prompts)
        # Without a mask and a padding id, transformers guesses them from the prompts.
        found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **overrides)
    return [_up_to_the_end(row[prompts.shape[1] :], ends) for row in found.tolist()]


def _up_to_the_end(ids: Sequence[int], ends: Sequence[int]) -> list[int]:
    length = next((n for n, token in enumerate(ids, 1) if token in ends), len(ids))
    return [*ids[:length]]


def _require_installed() -> None:
    if not is_installed():
        raise UnavailableError("transformers is not installed")


def _model(checkpoint: Checkpoint, dtype: str) -> Any:
    from transformers import GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(_config(checkpoint, dtype))
    state = _tensors(checkpoint)
    head = "transformer.lm_head.weight"
    state["lm_head.weight"] = state.pop(head) if head in state else state["transformer.wte.weight"]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model.to(getattr(torch, dtype)).eval()


def _config(checkpoint: Checkpoint, dtype: str, **more: Any) -> Any:
    from transformers import GPT2Config

    # Eager attention, because the fused implementations ignore reorder_and_upcast_attn. In float64 this option is
    # off, because transformers' "upcast" converts to float32.
    fields = {**checkpoint.config.to_hf(), "attn_implementation": "eager", "bos_token_id": None, "eos_token_id": None}
    if dtype == "float64":
        fields["reorder_and_upcast_attn"] = False
    return GPT2Config(**fields, **more)


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {f"transformer.{name}": tensor_from_array(array) for name, array in checkpoint.tensors.items()}


@contextmanager
def _copied_files(checkpoint: Checkpoint) -> Iterator[Path]:
    """Yield a temporary directory with the configuration, the tokenizer files and the generation settings."""
    found = {name: place for name, place in companions_of(checkpoint).items() if name != META}
    if checkpoint.format == HUGGINGFACE and checkpoint.path is not None:
        found[CONFIG] = checkpoint.path
    with TemporaryDirectory() as name:
        directory = Path(name)
        copy_companions(found, checkpoint.config, directory)
        if CONFIG not in found:  # other formats may have no config.json
            write_config(directory / CONFIG, checkpoint.config, checkpoint.extra)
        yield directory


@contextmanager
def _quietly(what: str) -> Iterator[None]:
    """Silence the warnings of transformers. Raise its errors as `UnavailableError`, with `what` as a prefix."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
        raise
    except BaseException as error:  # a panic of the tokenizers package is not an Exception
        raise UnavailableError(f"transformers {what}: {quoted(error, 200)}") from None
    finally:
        logging.set_verbosity(verbosity)
