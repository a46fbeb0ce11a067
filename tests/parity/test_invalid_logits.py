"""NaN or infinite logits are an error in every mode of generation. The error names the row and the token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run
from support.implementations import jax_model, torch_model
from support.models import TINY, random_checkpoint, random_ids
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import Checkpoint
from bridge.generation.config import GenerationConfig
from bridge.generation.decoder import Decoder
from bridge.generation.output import InvalidLogits
from bridge.generation.text import PROMPTS_PER_BATCH, generate_text, stream_text
from gpt2_jax.generation import Decoder as JaxDecoder
from gpt2_torch.generation import Decoder as TorchDecoder

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = replace(TINY, n_layer=1, tie_word_embeddings=False)
PROMPTS = [random_ids(CONFIG, 1, length, seed=length)[0].tolist() for length in (3, 7)]
LARGE = 3e38

FILTERED = {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2}
REQUESTS = {
    "greedy": GenerationConfig(4),
    "sampled": GenerationConfig(4, **FILTERED),
    "several": GenerationConfig(4, temperature=0.7, num_return_sequences=2, logprobs=True, eos_token_id=(5,)),
    "beams": GenerationConfig(4, num_beams=3),
}
each_backend = pytest.mark.parametrize("backend", ["gpt2_torch", "gpt2_jax"])


def decoder(backend: str, checkpoint: Checkpoint) -> Decoder[Any, Any]:
    if backend == "gpt2_torch":
        return TorchDecoder(torch_model(checkpoint))
    return JaxDecoder(*jax_model(checkpoint))


def with_head(rows: Any) -> Checkpoint:
    """Return a model whose logits are n_embd times these numbers, one for each token."""
    state = dict(random_checkpoint(CONFIG).tensors.items())
    head = np.broadcast_to(np.asarray(rows, np.float32)[:, None], state["lm_head.weight"].shape)
    norm = {"ln_f.weight": np.zeros_like(state["ln_f.weight"]), "ln_f.bias": np.ones_like(state["ln_f.bias"])}
    return Checkpoint.of({**state, **norm, "lm_head.weight": head.copy()}, CONFIG)


def one_token(value: float) -> np.ndarray:
    return np.where(np.arange(CONFIG.vocab_size) == 9, value, 0.1)


LOGITS = {"NaN": one_token(np.nan), "infinite": one_token(LARGE), "all -inf": np.full(CONFIG.vocab_size, -LARGE)}


@each_backend
@pytest.mark.parametrize("logits", LOGITS)
@pytest.mark.parametrize("name", REQUESTS)
def test_it_is_an_error_in_every_mode(name: str, logits: str, backend: str) -> None:
    with pytest.raises(InvalidLogits, match=r"^row 0, new token 0, counted from 0: the model's logits are NaN or inf"):
        decoder(backend, with_head(LOGITS[logits])).generate(PROMPTS, REQUESTS[name])


@each_backend
@pytest.mark.parametrize("name", REQUESTS)
def test_minus_infinity_for_some_tokens_is_no_error(name: str, backend: str) -> None:
    found = decoder(backend, with_head(one_token(-LARGE))).generate(PROMPTS, REQUESTS[name])
    assert all(0 <= i < CONFIG.vocab_size and i != 9 for row in found for c in row for i in c.ids)


@each_backend
def test_no_token_to_sample_is_an_error(backend: str) -> None:
    """transformers ends with an error of torch.multinomial."""
    V = CONFIG.vocab_size
    config = GenerationConfig(9, temperature=1.0, suppress_tokens=range(4, V), bad_words_ids=[[0], [1]])
    with pytest.raises(InvalidLogits, match=r"^row 0, new token 2, .* or the processors removed every token"):
        decoder(backend, with_head(one_token(1.0))).generate([[9]], replace(config, no_repeat_ngram_size=1))


@each_backend
@pytest.mark.parametrize("chunk_size", [None, 1, 3])
def test_the_error_names_the_row_and_the_token(backend: str, chunk_size: int | None) -> None:
    """The embedding of a token is NaN, and row 1 is the first row with it. Tokens streamed before it are correct."""
    right = random_checkpoint(CONFIG)
    config = GenerationConfig(8)
    ids = [row[0].ids for row in decoder(backend, right).generate(PROMPTS, config)]
    step = next(n for n in range(1, 7) if ids[1][n] not in {0, *ids[0], *ids[1][:n], *PROMPTS[0], *PROMPTS[1]})
    state = {name: np.array(array) for name, array in right.tensors.items()}
    state["wte.weight"][ids[1][step]] = np.nan
    chunks = decoder(backend, Checkpoint.of(state, CONFIG)).stream(PROMPTS, config, chunk_size)
    streamed: list[list[int]] = [[], []]
    with pytest.raises(InvalidLogits) as raised:
        for chunk in chunks:
            for row, new in zip(streamed, chunk.ids.tolist(), strict=True):
                row.extend(new)
    assert (raised.value.row, raised.value.step) == (1, step + 1)
    assert streamed == [row[: len(streamed[0])] for row in ids]
    assert chunk_size != 1 or len(streamed[0]) == step + 1


def test_the_error_counts_rows_over_all_prompts() -> None:
    encoding = bridge.byte_tokenizer()
    state = {name: np.array(array) for name, array in random_checkpoint(CONFIG).tensors.items()}
    state["wte.weight"][ord("!")] = np.nan
    broken = decoder("gpt2_torch", Checkpoint.of(state, CONFIG))
    prompts = ["a"] * PROMPTS_PER_BATCH + ["a", "!"]
    with pytest.raises(InvalidLogits, match=rf"^row {2 * (PROMPTS_PER_BATCH + 1)}, new token 0,"):
        generate_text(broken, encoding, prompts, GenerationConfig(1, temperature=1.0, num_return_sequences=2))
    with pytest.raises(InvalidLogits):
        list(stream_text(broken, encoding, "!", GenerationConfig(2)))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_the_command_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    bridge.save(with_head(LOGITS["NaN"]), tmp_path / "m", format="huggingface", allow_non_finite=True)
    write_byte_tokenizer(tmp_path / "m")
    arguments = ("generate", tmp_path / "m", "--backend", backend, "--max-new-tokens", 4)
    for more in (("We",), ("We", "--json", tmp_path / "g.json")):
        assert run(*arguments, *more) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "logits are NaN or infinite" in printed.err
    assert not (tmp_path / "g.json").exists()
    lines = iter(["We", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    run(*arguments, "--interactive")
    assert "logits are NaN or infinite" in capsys.readouterr().err
