"""A checkpoint's generation settings: the same ids and the same end as transformers' `generate` without arguments.

The settings are those of public models, of their documentation and of transformers' own, with ids of a small model.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.implementations import Decoders, decoders_of
from support.models import TINY, random_checkpoint, random_ids

import bridge
import gpt2_jax.logits_processors
import gpt2_jax.sampling
import gpt2_torch.logits_processors
import gpt2_torch.sampling
from bridge.generation.config import GenerationConfig
from bridge.generation.processors import padded_ids, seen_tokens

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = replace(TINY, n_layer=2)
PROMPTS = {length: random_ids(SMALL, 1, length, seed=length)[0].tolist() for length in (1, 6)}
ROUNDING = 1e-5
"""Relative error of float32 logits after a few operations."""

END = "the token that the model generates here"
"""In a setting below: replaced by a token of the text that the model generates without an end."""

Settings = Mapping[str, Any]

GREEDY: Mapping[str, Settings] = {
    "gpt2": {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": END, "transformers_version": "4.26.0"},
    "several ends": {"eos_token_id": [256, END], "pad_token_id": 3, "max_new_tokens": 12},
    "max_length includes the prompt": {"eos_token_id": 256, "max_length": 15},
    "leftovers of sampling": {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "top_k": 40, "eos_token_id": END},
    "repetition": {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "max_new_tokens": 25},
    "no token twice": {"no_repeat_ngram_size": 1, "max_new_tokens": 25, "eos_token_id": END},
    "a minimum": {"min_new_tokens": 9, "eos_token_id": END, "max_new_tokens": 14},
    "a minimum with the prompt": {"min_length": 14, "eos_token_id": END, "max_new_tokens": 14},
    "forbidden words": {"bad_words_ids": [[END], [7], [3, 9]], "suppress_tokens": [1, 2, 50], "max_new_tokens": 14},
    "forbidden first": {"begin_suppress_tokens": list(range(0, 257, 2)), "max_new_tokens": 14},
    "forced": {"forced_bos_token_id": 33, "forced_eos_token_id": 44, "eos_token_id": 44, "max_new_tokens": 10},
    "biased": {"sequence_bias": [[[8], 3.5], [[END], -8.0], [[17, 4], 2.0]], "max_new_tokens": 14},
    "towards the end": {"exponential_decay_length_penalty": [3, 1.6], "eos_token_id": 19, "max_new_tokens": 20},
}
BEAMS: Mapping[str, Settings] = {
    "bart": {"num_beams": 4, "no_repeat_ngram_size": 3, "early_stopping": True, "length_penalty": 2.0},
    "bart with an end": {"num_beams": 4, "early_stopping": True, "eos_token_id": END, "forced_eos_token_id": 12},
    "canonical": {"num_beams": 3, "early_stopping": "never", "eos_token_id": END, "max_new_tokens": 16},
    "short": {"num_beams": 3, "length_penalty": -1.0, "eos_token_id": END, "early_stopping": "never"},
    "repetition": {"num_beams": 3, "repetition_penalty": 1.3, "eos_token_id": END, "max_new_tokens": 12},
    "returned": {"num_beams": 4, "num_return_sequences": 3, "min_new_tokens": 6, "eos_token_id": [END, 9]},
    "forbidden": {"num_beams": 3, "bad_words_ids": [[END]], "suppress_tokens": [4], "max_new_tokens": 12},
    "no sampling": {"num_beams": 2, "top_k": 10, "temperature": 0.5, "max_new_tokens": 8},
}
SAMPLED: Mapping[str, Settings] = {
    "defaults": {"do_sample": True, "eos_token_id": 256},
    "chat": {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "max_length": 20},
    "everything": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "nucleus": {"do_sample": True, "top_k": 0, "top_p": 0.92, "no_repeat_ngram_size": 2},
    "min-p": {"do_sample": True, "min_p": 0.1, "top_k": 0},
    "typical": {"do_sample": True, "typical_p": 0.6, "top_k": 100},
    "epsilon": {"do_sample": True, "epsilon_cutoff": 3e-3, "top_k": 0},
    "eta": {"do_sample": True, "eta_cutoff": 6e-3, "top_k": 0, "temperature": 1.2},
    "all": {
        "do_sample": True,
        "temperature": 0.9,
        "top_k": 60,
        "top_p": 0.95,
        "typical_p": 0.9,
        "min_p": 0.01,
        "epsilon_cutoff": 1e-4,
        "eta_cutoff": 1e-3,
        "repetition_penalty": 1.05,
        "eos_token_id": 30,
        "min_new_tokens": 5,
        "bad_words_ids": [[5], [6, 7]],
        "suppress_tokens": [9],
    },
}


@pytest.fixture(scope="module")
def small(quick_compilation: None) -> Decoders:
    return decoders_of(random_checkpoint(SMALL))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A saved model without generation settings and without an end."""
    bridge.save(random_checkpoint(SMALL), tmp_path / "m", format="huggingface")
    return tmp_path / "m"


def stored(directory: Path, settings: Settings, file: str = "generation_config.json") -> bridge.GenerationDefaults:
    """Write settings and return the defaults that are read from them."""
    path = directory / file
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**fields, **settings}))
    return bridge.generation_defaults(bridge.load(directory))


def with_end(directory: Path, settings: Settings, prompt: list[int]) -> Settings:
    """Replace `END` by the seventh token of the greedy text, or by an earlier one that is more likely to occur."""
    if END not in json.dumps(settings):
        return settings
    token = generated_by_transformers(directory, prompt, eos_token_id=None, max_new_tokens=7)[0][-1]
    return json.loads(json.dumps(settings).replace(json.dumps(END), str(token)))


def generated_by_transformers(directory: Path, prompt: list[int], **fields: Any) -> list[list[int]]:
    """Return the new ids of `generate` with a model that was loaded with its settings, up to the first end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GPT2LMHeadModel.from_pretrained(directory)
        ids = torch.tensor([prompt])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), **fields)
    ends = fields.get("eos_token_id", model.generation_config.eos_token_id)
    ends = set() if ends is None else {*np.ravel(ends).tolist()}
    rows = [row[len(prompt) :] for row in found.tolist()]
    lengths = [min((n for n, token in enumerate(row, 1) if token in ends), default=len(row)) for row in rows]
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("length", PROMPTS)
@pytest.mark.parametrize("name", [*GREEDY, *(f"beams: {name}" for name in BEAMS)])
def test_ids_and_end_are_those_of_transformers(name: str, length: int, directory: Path, small: Decoders) -> None:
    prompt = PROMPTS[length]
    settings = with_end(directory, {**GREEDY, **{f"beams: {k}": v for k, v in BEAMS.items()}}[name], prompt)
    defaults = stored(directory, settings)
    expected = generated_by_transformers(directory, prompt)
    config = defaults.config(len(prompt))
    assert defaults.notes == ()
    for backend, decoder in small.items():
        [found] = decoder.generate([prompt], config)
        assert [output.ids for output in found] == expected, backend


def test_some_of_these_texts_end_early(directory: Path) -> None:
    """An end that is never reached would prove little."""
    ended = 0
    for settings in [*GREEDY.values(), *BEAMS.values()]:
        if END in json.dumps(settings) and "eos_token_id" in settings:
            (directory / "generation_config.json").unlink(missing_ok=True)
            prompt = PROMPTS[6]
            defaults = stored(directory, with_end(directory, settings, prompt))
            lengths = [len(row) for row in generated_by_transformers(directory, prompt)]
            ended += min(lengths) < defaults.config(len(prompt)).max_new_tokens
    assert ended >= 6


@pytest.mark.parametrize("name", SAMPLED)
def test_the_same_tokens_are_kept_at_every_step(name: str, directory: Path) -> None:
    """Both backends apply their processors to the logits and tokens of a text that transformers samples."""
    prompt, V = PROMPTS[6], SMALL.vocab_size
    config = stored(directory, SAMPLED[name]).config(len(prompt))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.GPT2LMHeadModel.from_pretrained(directory)
        torch.manual_seed(1)
        ids = torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            output_logits=True,
        )
    assert config.max_new_tokens == len(found.scores) or found.sequences[0, -1] in config.eos_token_ids
    for n, (logits, scores) in enumerate(zip(found.logits, found.scores, strict=True)):
        so_far = found.sequences[:, : len(prompt) + n].numpy()
        for kept in (torch_kept, jax_kept):
            ours = kept(config, logits.numpy(), so_far, n)
            np.testing.assert_array_equal(ours > -np.inf, scores.numpy() > -np.inf, err_msg=f"step {n}")
            np.testing.assert_allclose(ours, scores.numpy(), rtol=ROUNDING, atol=ROUNDING)
    assert name == "everything" or min((s > -np.inf).sum() for s in found.scores) < V


def torch_kept(config: GenerationConfig, logits: np.ndarray, ids: np.ndarray, new: int) -> np.ndarray:
    history = padded_ids(ids, np.zeros(1, int), ids.shape[1], 1)
    processors = gpt2_torch.logits_processors.on_device(config, SMALL.vocab_size, torch.device("cpu"))
    seen = torch.from_numpy(seen_tokens(history, SMALL.vocab_size))
    state = gpt2_torch.logits_processors.History(torch.from_numpy(history).long(), seen, ids.shape[1], new)
    processed = gpt2_torch.logits_processors.process_logits(torch.tensor(logits), processors, state)
    return gpt2_torch.sampling.truncate(processed, processors).numpy()


def jax_kept(config: GenerationConfig, logits: np.ndarray, ids: np.ndarray, new: int) -> np.ndarray:
    history = padded_ids(ids, np.zeros(1, int), SMALL.n_positions, 1)
    processors = gpt2_jax.logits_processors.on_device(config, SMALL.vocab_size)
    state = gpt2_jax.logits_processors.History(
        history, seen_tokens(history, SMALL.vocab_size), jnp.int32(ids.shape[1]), jnp.int32(new)
    )
    return np.asarray(_jit_kept(logits, processors, state))


@jax.jit
def _jit_kept(logits: Any, processors: Any, history: Any) -> Any:
    return gpt2_jax.sampling.truncate(
        gpt2_jax.logits_processors.process_logits(logits, processors, history), processors
    )


# Where the settings are from


@pytest.mark.parametrize(
    "settings",
    [{"eos_token_id": END}, {"eos_token_id": [3, END], "max_length": 12}, {"repetition_penalty": 1.2}],
    ids=["one end", "several ends", "no end"],
)
def test_without_a_file_the_settings_of_config_json_apply(settings: Settings, directory: Path, small: Decoders) -> None:
    prompt = PROMPTS[6]
    defaults = stored(directory, with_end(directory, settings, prompt), "config.json")
    expected = generated_by_transformers(directory, prompt)
    [[found]] = small["gpt2_torch"].generate([prompt], defaults.config(len(prompt)))
    assert [found.ids] == expected
    assert (defaults.eos_source or "config.json") == "config.json"


def test_old_sampling_settings_in_config_json_apply(directory: Path) -> None:
    settings = {"do_sample": True, "temperature": 0.8, "top_k": 12, "task_specific_params": {"x": {"top_k": 3}}}
    defaults = stored(directory, settings, "config.json")
    model = transformers.GPT2LMHeadModel.from_pretrained(directory)
    for name in ("do_sample", "temperature", "top_k"):
        assert getattr(model.generation_config, name) == defaults.settings[name]
    config = defaults.config()
    assert (config.temperature, config.top_k) == (0.8, 12)
    assert defaults.notes == (), "transformers' generate ignores task_specific_params, too"


def test_a_file_hides_the_settings_of_config_json_but_not_its_end(directory: Path) -> None:
    stored(directory, {"eos_token_id": 7, "repetition_penalty": 1.5}, "config.json")
    defaults = stored(directory, {"max_new_tokens": 4})
    assert (defaults.source, defaults.eos_token_ids, defaults.eos_source) == (
        "generation_config.json",
        (7,),
        "config.json",
    )
    assert defaults.config().repetition_penalty is None


NAMED: Mapping[str, Settings | None] = {
    "no file": None,
    "not named": {},
    "null": {"eos_token_id": None},
    "one": {"eos_token_id": END},
    "several": {"eos_token_id": [3, END]},
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("in_config", [name for name in NAMED if name != "no file"])
@pytest.mark.parametrize("in_file", NAMED)
def test_the_end_is_that_of_transformers_or_one_that_it_ignores(
    in_file: str, in_config: str, directory: Path, small: Decoders
) -> None:
    """transformers reads one file. If that file does not name an end and config.json does, the text ends here."""
    prompt = PROMPTS[6]
    own, of_config = (with_end(directory, NAMED[name] or {}, prompt) for name in (in_file, in_config))
    if in_file != "no file":
        stored(directory, own)
    defaults = stored(directory, of_config, "config.json")
    [expected] = generated_by_transformers(directory, prompt)
    [[found]] = small["gpt2_torch"].generate([prompt], defaults.config(len(prompt)))
    if in_file == "not named" and in_config in ("one", "several"):
        assert found.ids == expected[: len(found.ids)] and len(found.ids) < len(expected)
        assert "transformers would not end it" in defaults.notes[-1]
    else:
        assert found.ids == expected
        assert defaults.notes == ()


def test_the_defaults_without_settings_are_those_of_transformers(directory: Path) -> None:
    theirs = transformers.GenerationConfig._get_default_generation_params()
    defaults = bridge.generation_defaults(bridge.load(directory))
    assert (defaults.source, defaults.eos_token_ids) == (None, ())
    greedy, sampled = defaults.config(3), defaults.config(3, do_sample=True)
    assert greedy == GenerationConfig(theirs["max_length"], eos_token_id=())
    assert (theirs["do_sample"], greedy.temperature) == (False, 0.0)
    assert (sampled.temperature, sampled.top_k) == (theirs["temperature"], theirs["top_k"])
    for name in ("top_p", "typical_p", "repetition_penalty", "no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff"):
        assert replace(sampled, **{name: theirs[name]}).active(name) is None, name
    for name in ("num_beams", "length_penalty", "early_stopping", "num_return_sequences"):
        assert getattr(sampled, name) == theirs[name], name
    assert defaults.config(SMALL.n_positions - 2).max_new_tokens == 2
