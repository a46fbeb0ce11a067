"""Generated text: equal in every implementation, and for a prompt alone and in a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.implementations import Decoders, decoders_of, each_backend, torch_model, transformers_model
from support.models import TINY, random_checkpoint, random_ids

import bridge
from bridge import BUNDLED, Checkpoint, GPT2Config
from bridge.generation.config import GenerationConfig, uniform_noise
from bridge.generation.output import ENDED
from gpt2_torch.logits_processors import on_device
from gpt2_torch.sampling import select_token

pytestmark = pytest.mark.usefixtures("quick_compilation")

LOGPROB_ROUNDING = 2e-5
"""Nats. Logits are about 20 with a rounding of 2e-6 of that. Sums have another order in a batch than alone."""

SMALL = replace(TINY, n_layer=2)  # enough for layers to differ; more layers take longer to compile
LENGTHS = (3, 11, 1, 7)
PROMPTS = [random_ids(SMALL, 1, length, seed=length)[0].tolist() for length in LENGTHS]
EOS_TOKEN_IDS = tuple(range(0, SMALL.vocab_size, 20))  # so many that some row contains one


def greedy_ids_of_transformers(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),  # otherwise transformers takes id 0 for padding
        do_sample=False,
        max_new_tokens=max_new_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    return found[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def bundled() -> Checkpoint:
    return bridge.load("bundled")


@pytest.fixture(scope="module")
def trained(bundled: Checkpoint, quick_compilation: None) -> Decoders:
    return decoders_of(bundled)


@pytest.fixture(scope="module")
def small(quick_compilation: None) -> Decoders:
    return decoders_of(random_checkpoint(SMALL))


@pytest.fixture(scope="module")
def prompts(bundled: Checkpoint) -> list[list[int]]:
    """Return twenty pieces of text that the model was not trained on, of 1 to 39 tokens."""
    text = (BUNDLED / "validation.txt").read_text(encoding="utf-8")
    ids = bundled.tokenizer().encode(text, special_tokens="as_text")
    return [ids[2000 * i : 2000 * i + 1 + 2 * i] for i in range(20)]


@pytest.mark.thorough
def test_all_implementations_generate_the_same_greedy_text(
    bundled: Checkpoint, trained: Decoders, prompts: list[list[int]]
) -> None:
    tokenizer, peer, generation_config = bundled.tokenizer(), transformers_model(bundled), GenerationConfig(24)
    written = set()
    for prompt in prompts:
        expected = tokenizer.decode(greedy_ids_of_transformers(peer, prompt, 24))
        for name, decoder in trained.items():
            assert tokenizer.decode(decoder.generate([prompt], generation_config)[0][0].ids) == expected, (name, prompt)
        written.add(expected)
    assert len(written) > len(prompts) / 2, "texts must depend on the prompt"


@pytest.mark.slow
def test_all_implementations_generate_the_same_greedy_tokens_at_124m() -> None:
    """Weights are normal with a standard deviation of 0.06, three times GPT-2's. Scales of norms are around 1.

    With initial weights, a tied model repeats its last token; with these weights, the layers have an effect. The two
    largest of 50257 normal logits are 0.2 standard deviations apart on average, so about one token in 10^4 has a gap
    within the rounding of float32, 1e-5. No such token occurs here.
    """
    config, rng, state = GPT2Config(), np.random.default_rng(0), {}
    for p in bridge.parameters(config):
        values = rng.standard_normal(p.torch_shape, np.float32) * np.float32(0.06)
        is_norm = ".ln_" in f".{p.torch_name}" and p.torch_name.endswith("weight")
        state[p.torch_name] = values + np.float32(1.0) if is_norm else values
    checkpoint = Checkpoint.of(state, config)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in (2, 9, 5)]
    peer = transformers_model(checkpoint)
    expected = [greedy_ids_of_transformers(peer, prompt, 12) for prompt in prompts]
    assert len({token for row in expected for token in row}) > 12, "the tokens must vary"
    for name, decoder in decoders_of(checkpoint).items():
        assert [row[0].ids for row in decoder.generate(prompts, GenerationConfig(12))] == expected, name


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "filters",
    [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9}, {"temperature": 1.2, "min_p": 0.05}],
    ids=["all tokens", "top-k and top-p", "min-p"],
)
def test_both_backends_sample_the_same_text(
    filters: dict[str, Any], bundled: Checkpoint, trained: Decoders, prompts: list[list[int]]
) -> None:
    tokenizer, generation_config = (
        bundled.tokenizer(),
        GenerationConfig(40, seed=7, num_return_sequences=2, repetition_penalty=1.1, **filters),
    )
    ours, port = (
        [[tokenizer.decode(sample.ids) for sample in row] for row in decoder.generate(prompts[2:5], generation_config)]
        for decoder in trained.values()
    )
    assert ours == port
    assert len({text for row in ours for text in row}) == 6


CONFIGS = {
    "greedy": GenerationConfig(21, logprobs=True),
    "sampled": GenerationConfig(21, logprobs=True, temperature=1.0, seed=3),
    "several samples": GenerationConfig(21, logprobs=True, temperature=2.0, num_return_sequences=3),
    "repetition penalized": GenerationConfig(21, logprobs=True, repetition_penalty=1.5),
    "samples with repetition penalized": GenerationConfig(
        21, logprobs=True, temperature=0.7, repetition_penalty=1.5, num_return_sequences=2
    ),
    "end of sequence": GenerationConfig(21, logprobs=True, temperature=3.0, eos_token_id=EOS_TOKEN_IDS),
    "history": GenerationConfig(
        21,
        logprobs=True,
        sequence_bias=[((7,), 1.5), ((3, 4, 5), 3.0)],
        no_repeat_ngram_size=1,
        bad_words_ids=[[8], [11, 12], [1, 2, 3, 4]],
        min_new_tokens=4,
        eos_token_id=EOS_TOKEN_IDS,
        forced_bos_token_id=13,
        exponential_decay_length_penalty=(6, 1.05),
        begin_suppress_tokens=[*range(0, SMALL.vocab_size, 2)],
    ),
    "slide": GenerationConfig(61, logprobs=True, slide=True),
    "slide with end of sequence": GenerationConfig(
        61, logprobs=True, temperature=2.0, slide=True, eos_token_id=EOS_TOKEN_IDS[:2]
    ),
}


@pytest.mark.sampled(5)
@each_backend
@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_does_not_depend_on_the_others(name: str, backend: str, small: Decoders) -> None:
    generation_config = CONFIGS[name]
    together = small[backend].generate(PROMPTS, generation_config)
    assert len({tuple(c.ids) for row in together for c in row}) > 1
    for prompt, row in zip(PROMPTS, together, strict=True):
        alone = small[backend].generate([prompt], generation_config)[0]
        assert [c.ids for c in row] == [c.ids for c in alone]
        for ours, expected in zip(row, alone, strict=True):
            np.testing.assert_allclose(ours.logprobs, expected.logprobs, rtol=0, atol=LOGPROB_ROUNDING)


@each_backend
def test_the_order_of_the_rows_does_not_matter(backend: str, small: Decoders) -> None:
    generation_config = CONFIGS["several samples"]
    forwards, backwards = (small[backend].generate(rows, generation_config) for rows in (PROMPTS, PROMPTS[::-1]))
    assert [[c.ids for c in row] for row in forwards] == [[c.ids for c in row] for row in backwards[::-1]]
    assert len({tuple(sample.ids) for sample in forwards[0]}) == 3


@each_backend
def test_a_row_ends_with_its_first_end_of_sequence_token(backend: str, small: Decoders) -> None:
    generation_config = CONFIGS["end of sequence"]
    free = small[backend].generate(PROMPTS, replace(generation_config, eos_token_id=()))
    lengths = set()
    for [ended], [whole] in zip(small[backend].generate(PROMPTS, generation_config), free, strict=True):
        stops = [n for n, token in enumerate(whole.ids, start=1) if token in EOS_TOKEN_IDS]
        assert ended.ids == whole.ids[: min([*stops, generation_config.max_new_tokens])]
        lengths.add(len(ended.ids))
    assert min(lengths) < generation_config.max_new_tokens
    assert len(lengths) > 1, "rows must end at different tokens"


@each_backend
def test_log_probabilities_are_the_models_own(backend: str, small: Decoders) -> None:
    """They are those of the model's logits without a cache, before the processors."""
    model = torch_model(random_checkpoint(SMALL))
    generation_config = CONFIGS["several samples"]
    for prompt, row in zip(PROMPTS, small[backend].generate(PROMPTS, generation_config), strict=True):
        for continuation in row:
            ids = torch.tensor([*prompt, *continuation.ids])
            with torch.no_grad():
                logprobs = model(ids[None])[0].log_softmax(-1)[len(prompt) - 1 : -1]
            expected = logprobs.gather(1, ids[len(prompt) :, None])[:, 0].numpy()
            assert expected.min() < np.log(0.1), "the tokens must be uncertain"
            np.testing.assert_allclose(continuation.logprobs, expected, rtol=0, atol=LOGPROB_ROUNDING)


def plain_continuation(prompt: list[int], generation_config: GenerationConfig) -> list[int]:
    """Generate without a cache: run the whole row for each token, and keep its last half when it is full."""
    model, row, new, positions = torch_model(random_checkpoint(SMALL)), [*prompt], [], SMALL.n_positions
    for draw in uniform_noise(generation_config)[0]:
        if len(row) >= positions:
            row = row[-(positions // 2) :]
        with torch.no_grad():
            logits = model(torch.tensor([row]))[:, -1]
        processors = on_device(generation_config, SMALL.vocab_size, logits.device)
        new.append(int(select_token(logits, torch.tensor([draw]), processors)))
        row.append(new[-1])
    return new


@each_backend
@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_a_full_row_continues_from_its_last_half(temperature: float, backend: str, small: Decoders) -> None:
    generation_config = GenerationConfig(61, logprobs=True, temperature=temperature, slide=True)
    for length in (3, SMALL.n_positions, SMALL.n_positions + 9):
        prompt = random_ids(SMALL, 1, length, seed=1)[0].tolist()
        [[output]] = small[backend].generate([prompt], generation_config)
        assert output.ids == plain_continuation(prompt, generation_config), length


@pytest.mark.sampled(2)
@each_backend
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_new_tokens_are_counted_across_slides(chunk_size: int | None, backend: str, small: Decoders) -> None:
    end, forced = 5, (9, 12)
    config = GenerationConfig(
        61,
        temperature=2.0,
        slide=True,
        eos_token_id=(end, *forced),
        sequence_bias=[((end,), 30.0)],
        min_new_tokens=60,
        forced_eos_token_id=forced,
    )
    chunks = [*small[backend].stream(PROMPTS, config, chunk_size)]
    ids = np.concatenate([chunk.ids for chunk in chunks], axis=1)
    assert ids.shape[1] == 61
    assert not np.isin(ids[:, :60], config.eos_token_ids).any(), "the bias makes the end all but certain"
    assert np.isin(ids[:, 60], forced).all()
    earlier = small[backend].generate(PROMPTS, replace(config, min_new_tokens=45, forced_eos_token_id=None))
    assert [len(row[0].ids) for row in earlier] == [46] * len(PROMPTS)


@pytest.mark.sampled(5)
@each_backend
@pytest.mark.parametrize("chunk_size", [1, 3, 7])
@pytest.mark.parametrize("name", ["several samples", "end of sequence", "slide"])
def test_chunks_are_the_tokens_of_generate(name: str, chunk_size: int, backend: str, small: Decoders) -> None:
    generation_config = CONFIGS[name]
    chunks = [*small[backend].stream(PROMPTS, generation_config, chunk_size)]
    assert {chunk.ids.shape[1] for chunk in chunks} <= {*range(1, chunk_size + 1)}
    assert len(chunks) > 2
    expected = small[backend].generate(PROMPTS, generation_config)
    ids = np.concatenate([chunk.ids for chunk in chunks], axis=1)
    logprobs = np.concatenate([chunk.logprobs for chunk in chunks if chunk.logprobs is not None], axis=1)
    for r, continuation in enumerate(c for row in expected for c in row):
        new = ids[r] != ENDED
        assert ids[r, new].tolist() == continuation.ids
        assert logprobs[r, new].tolist() == continuation.logprobs
        assert not new[len(continuation.ids) :].any()


@each_backend
def test_beam_search_cannot_be_streamed(backend: str, small: Decoders) -> None:
    with pytest.raises(ValueError, match="beam search"):
        small[backend].stream(PROMPTS, GenerationConfig(3, num_beams=2))
    with pytest.raises(ValueError, match="slide"):
        small[backend].stream(PROMPTS, GenerationConfig(SMALL.n_positions))
    with pytest.raises(IndexError, match="vocabulary"):
        small[backend].stream([[SMALL.vocab_size]], GenerationConfig(3))
