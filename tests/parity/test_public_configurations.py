"""Configurations of public GPT-2 models load, compute what transformers computes, and survive every conversion."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.implementations import decoders_of, jax_logits, torch_logits
from support.models import random_ids, random_state
from support.public_configurations import PUBLIC, SMALLEST_VOCABULARY, Fields, shrunk, without
from support.public_text import ASSIGNED, PUBLISHED, TEXT, files_of_kind, write_text
from support.tokenizers_for_tests import TEXTS
from tokenizing.kinds import KINDS

import bridge
from bridge import Checkpoint, ConfigError, GPT2Config
from bridge.config_fields import ALIASES
from bridge.containers.safetensors import write_file
from bridge.formats import FORMATS, WRITABLE
from bridge.formats.directory import CARRIED_FILES, companions_of
from bridge.storage.tensors import LazyTensorMap
from bridge.tokenizers.byte_level_bpe import ByteLevelBPE
from bridge.tokenizers.loading import TOKENIZER_FILES

pytestmark = pytest.mark.usefixtures("quick_compilation")

FP32_ABSOLUTE = 1e-5  # as in test_agreement.py

REWRITTEN = {"architectures", "model_type", "n_ctx", *(alias for names in ALIASES.values() for alias in names)}
"""Fields that an export has whatever the source had, and aliases, which it does not need."""

each_model = pytest.mark.parametrize("name", PUBLIC)


def directory(path: Path, name: str) -> Path:
    """Write a small random model with this `config.json`, tokenizer and settings, as transformers would save it."""
    path.mkdir()
    small = {**shrunk(PUBLIC[name][1]), **write_text(path, TEXT[name])}
    (path / "config.json").write_text(json.dumps(small, indent=2))
    state = random_state(GPT2Config.from_hf(small))
    halved = {f"transformer.{name}": w if w.mean() > 0.5 else w / 2 for name, w in state.items()}
    write_file(path / "model.safetensors", LazyTensorMap.of(halved), {"format": "pt"})
    return path


def in_transformers(path: Path, ids: np.ndarray) -> np.ndarray:
    """The logits of the model as transformers opens the directory, with every tensor from the file."""
    model, report = transformers.GPT2LMHeadModel.from_pretrained(
        path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(torch.from_numpy(ids)).logits.numpy()


def kept(fields: Fields) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in REWRITTEN}


@pytest.mark.sampled(5)
@each_model
def test_the_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    path = directory(tmp_path / "model", name)
    checkpoint = bridge.load(path)
    ids = random_ids(checkpoint.config, length=min(9, checkpoint.config.n_positions))
    theirs = in_transformers(path, ids)
    assert np.abs(torch_logits(checkpoint, ids) - theirs).max() <= FP32_ABSOLUTE
    assert np.abs(jax_logits(checkpoint, ids) - theirs).max() <= FP32_ABSOLUTE
    bridge.save(checkpoint, tmp_path / "export", format="huggingface")
    np.testing.assert_array_equal(in_transformers(tmp_path / "export", ids), theirs)


def seen_by_transformers(path: Path) -> dict[str, Any]:
    """What transformers loads beside the weights. Every model is read as a GPT-2, even if its file does not say so."""
    config = transformers.GPT2Config.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, config=config)
    stored = config.to_dict()
    generation = (
        transformers.GenerationConfig.from_pretrained(path)
        if (path / "generation_config.json").exists()
        else transformers.GenerationConfig.from_model_config(config)
    )
    return {
        "config": {name: value for name, value in stored.items() if name not in {*REWRITTEN, "transformers_version"}},
        "generation": generation.to_dict(),
        "tokenizer": [
            type(tokenizer),
            tokenizer.get_vocab(),
            tokenizer.special_tokens_map,
            tokenizer.added_tokens_decoder,
            tokenizer.backend_tokenizer.to_str(),
        ],
    }


def companions(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir() if file.name in CARRIED_FILES}


def assert_named(left_out: tuple[str, ...], original: Checkpoint, format: str) -> None:
    """Assert that the writer of a single file named every companion that the file does not hold."""
    for name in companions_of(original):
        is_kept = FORMATS[format].keeps_tokenizer and name in TOKENIZER_FILES
        assert is_kept or name in " ".join(left_out)
    if FORMATS[format].keeps_tokenizer:
        is_named = any("its tokenizer" in sentence for sentence in left_out)
        assert is_named != isinstance(original.tokenizer(), ByteLevelBPE)


@pytest.mark.sampled(5)
@each_model
def test_every_format_carries_the_model_or_names_the_field(tmp_path: Path, name: str) -> None:
    source = directory(tmp_path / "model", name)
    original = bridge.load(source)
    text, seen = companions(source), seen_by_transformers(source)
    holding = []
    for format in WRITABLE:
        try:
            bridge.save(original, tmp_path / format, format=format)
        except ConfigError as error:
            assert any(f"{name}=" in str(error) for name in vars(original.config)), error
            continue
        holding.append(format)
        if suffixes := FORMATS[format].suffixes:
            assert_named(bridge.save(original, tmp_path / f"model{suffixes[0]}", format=format), original, format)
        found = bridge.load(tmp_path / format)
        assert_same(found, original)
        bridge.save(found, tmp_path / f"{format}-back", format="huggingface")
        back = bridge.load(tmp_path / f"{format}-back")
        assert_same(back, original)
        exported = json.loads((tmp_path / f"{format}-back" / "config.json").read_bytes())
        assert exported["n_ctx"] == exported["n_positions"] == original.config.n_positions
        written = kept(json.loads((source / "config.json").read_bytes()))
        assert written.items() <= exported.items()
        assert companions(tmp_path / format) == companions(tmp_path / f"{format}-back") == text
    assert seen_by_transformers(tmp_path / f"{holding[-1]}-back") == seen
    assert {"huggingface", "flax"} <= set(holding)


def assert_same(found: Checkpoint, original: Checkpoint) -> None:
    assert found.config == original.config
    assert kept(found.extra) == kept(original.extra)
    assert bridge.fingerprint(found.tensors) == bridge.fingerprint(original.tensors)


def test_there_are_forty_configurations_of_different_models() -> None:
    assert len(PUBLIC) >= 40
    assert PUBLIC.keys() == TEXT.keys() and not PUBLISHED.keys() & ASSIGNED.keys()
    assert {text.tokenizer for text in TEXT.values()} == KINDS.keys()
    assert len({json.dumps(fields, sort_keys=True) for _, fields in PUBLIC.values()}) == len(PUBLIC)


# Text

PROMPT = "the dog"
NEW_TOKENS = 7
BEAMS: dict[str, Any] = {"num_beams": 2, "do_sample": False, "num_return_sequences": 1}


def text_directory(path: Path, name: str) -> Path:
    """Write a model that generates tokens of its tokenizer, and often one that ends the text.

    Most models have the same sizes, so that JAX compiles few programs.
    """
    path.mkdir()
    sizes = {"n_embd": 768, "n_head": 12, "n_layer": 1, "n_positions": 64 * 32}
    dropout = {"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1}
    fields = without(PUBLIC[name][1], "n_inner", "intermediate_size", "hidden_size") | sizes | dropout
    small = {"model_type": "gpt2", **shrunk(fields, SMALLEST_VOCABULARY), **write_text(path, TEXT[name])}
    (path / "config.json").write_text(json.dumps(small))
    state = random_state(GPT2Config.from_hf(small))
    state["wte.weight"][len(files_of_kind(TEXT[name].tokenizer)[1]) :] = 0
    generation = json.loads((path / "generation_config.json").read_bytes()) if TEXT[name].generation else {}
    for end in np.ravel(generation.get("eos_token_id", small.get("eos_token_id"))):
        if end is not None and end < SMALLEST_VOCABULARY:
            state["wte.weight"][end] *= 5
    tensors = {f"transformer.{name}": weight for name, weight in state.items()}
    write_file(path / "model.safetensors", LazyTensorMap.of(tensors), {"format": "pt"})
    return path


def text_of_transformers(model: Any, tokenizer: Any, **overrides: Any) -> tuple[list[int], str]:
    """Return the new ids, up to the first end, and their text without it."""
    ids = torch.tensor([tokenizer(PROMPT)["input_ids"]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **overrides)[0].tolist()
    ends = {*np.ravel(model.generation_config.eos_token_id).tolist()}
    new = found[ids.shape[1] :]
    length = next((n for n, token in enumerate(new, 1) if token in ends), len(new))
    shown = [token for token in new[:length] if token not in ends]
    before = tokenizer.decode(ids[0])
    return new[:length], tokenizer.decode([*ids[0].tolist(), *shown]).removeprefix(before)


@pytest.fixture(scope="module")
def ended() -> set[str]:
    """The models whose text ended before its limit."""
    return set()


@pytest.mark.sampled(5)
@each_model
def test_text_and_its_end_are_those_of_transformers(tmp_path: Path, name: str, ended: set[str]) -> None:
    path = text_directory(tmp_path / "model", name)
    checkpoint = bridge.load(path)
    ours, theirs = checkpoint.tokenizer(), transformers.AutoTokenizer.from_pretrained(path)
    for text in (PROMPT, *TEXTS[4:13]):
        assert ours.encode(text) == theirs(text)["input_ids"]
    model = transformers.GPT2LMHeadModel.from_pretrained(path, attn_implementation="eager")
    defaults, decoders = bridge.generation_defaults(checkpoint, ours), decoders_of(checkpoint)
    greedy: dict[str, Any] = {"do_sample": False, "num_return_sequences": 1}
    if not {"max_length", "max_new_tokens"} & defaults.settings.keys():
        greedy["max_new_tokens"] = NEW_TOKENS
    for overrides in (greedy, {**greedy, **BEAMS}):
        config = defaults.config(len(ours.encode(PROMPT)), **overrides)
        expected = text_of_transformers(model, theirs, **overrides)
        for backend, decoder in decoders.items():
            [[found]] = bridge.generate_text(decoder, ours, [PROMPT], config)
            assert (found.ids, found.text) == expected, backend
            if found.stopped:
                ended.add(name)


@pytest.mark.thorough  # `make test` runs too few of these texts
def test_some_of_these_texts_end_early(ended: set[str]) -> None:
    """An end that is never reached would prove little. The tests above have run, or none of them has."""
    assert len(ended) > 10 or not ended
