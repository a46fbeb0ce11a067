"""Sampling from the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support.models import TINY, random_checkpoint, random_ids

from bridge import GenerationConfig
from gpt2_torch import GPT2, generate, model_from_checkpoint
from gpt2_torch.generation import Decoder

BFLOAT16_NATS = 0.3
"""bfloat16 has 8 bits of precision: logits of 16 and more are multiples of 0.125, and each layer adds rounding."""

PROMPTS = torch.from_numpy(random_ids(TINY, batch=3, length=4))


@pytest.fixture(scope="module")
def model() -> GPT2:
    return model_from_checkpoint(random_checkpoint())


def test_greedy_tokens_are_the_most_likely(model: GPT2):
    ids = generate(model, PROMPTS, max_new_tokens=9)
    assert ids.shape == (3, 13)
    assert torch.equal(ids[:, :4], PROMPTS)
    assert torch.equal(ids[:, 4:], model(ids)[:, 3:-1].argmax(dim=-1))


def test_the_tokens_depend_on_the_seed(model: GPT2):
    first = generate(model, PROMPTS, max_new_tokens=9, temperature=1.0, seed=1)
    assert torch.equal(first, generate(model, PROMPTS, max_new_tokens=9, temperature=1.0, seed=1))
    assert not torch.equal(first, generate(model, PROMPTS, max_new_tokens=9, temperature=1.0, seed=2))


def test_sampling_does_not_use_torchs_generator(model: GPT2):
    state = torch.get_rng_state()
    generate(model, PROMPTS, max_new_tokens=3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)


def test_one_candidate_is_greedy(model: GPT2):
    sampled = generate(model, PROMPTS, max_new_tokens=9, temperature=5.0, top_k=1)
    assert torch.equal(sampled, generate(model, PROMPTS, max_new_tokens=9))


def test_only_the_k_most_likely_tokens_are_sampled(model: GPT2):
    ids = generate(model, PROMPTS, max_new_tokens=20, temperature=9.0, top_k=3)
    candidates = model(ids)[:, 3:-1].topk(3).indices
    assert (candidates == ids[:, 4:, None]).any(dim=-1).all()
    assert not torch.equal(candidates[..., 0], ids[:, 4:])


def test_more_than_the_positions_is_refused(model: GPT2):
    assert generate(model, PROMPTS, max_new_tokens=36).shape == (3, TINY.n_positions)
    with pytest.raises(ValueError, match=r"41 tokens.*n_positions=40"):
        generate(model, PROMPTS, max_new_tokens=37)


def test_prompts_that_cannot_be_continued_are_refused(model: GPT2):
    with pytest.raises(ValueError, match="empty"):
        generate(model, PROMPTS[:, :0], max_new_tokens=1)
    with pytest.raises(IndexError, match="vocabulary"):
        generate(model, PROMPTS + TINY.vocab_size, max_new_tokens=1)


def test_the_mode_of_the_model_is_restored(model: GPT2, monkeypatch: pytest.MonkeyPatch):
    model.train()
    generate(model, PROMPTS, max_new_tokens=1)
    assert model.training
    monkeypatch.setattr(GPT2, "decode", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(model, PROMPTS, max_new_tokens=1)
    assert model.training
    model.eval()


def test_a_model_can_be_trained_on_generated_ids(model: GPT2):
    ids = generate(model, PROMPTS, max_new_tokens=3)
    model(ids).mean().backward()
    assert model.wte.weight.grad is not None


def test_dropout_is_off_while_a_model_in_training_generates():
    dropping = model_from_checkpoint(random_checkpoint(replace(TINY, embd_pdrop=0.5, attn_pdrop=0.5, resid_pdrop=0.5)))
    expected = generate(dropping.eval(), PROMPTS, max_new_tokens=9)
    assert torch.equal(generate(dropping.train(), PROMPTS, max_new_tokens=9), expected)


def test_a_row_is_filled_with_the_token_that_ended_it(model: GPT2):
    free = generate(model, PROMPTS, max_new_tokens=9)
    stop = int(free[0, 6])
    ids = generate(model, PROMPTS, max_new_tokens=9, eos_token_id=[stop])
    assert ids.shape == free.shape
    for row, whole in zip(ids.tolist(), free.tolist(), strict=True):
        end = whole.index(stop, 4) + 1 if stop in whole[4:] else len(whole)
        assert row == [*whole[:end], *[stop] * (len(whole) - end)]


def test_outputs_of_a_prompt_are_adjacent(model: GPT2):
    ids = generate(model, PROMPTS, max_new_tokens=5, temperature=3.0, num_return_sequences=2)
    assert torch.equal(ids[:, :4], PROMPTS.repeat_interleave(2, dim=0))
    assert len({tuple(row) for row in ids.tolist()}) == 6


def test_a_model_in_half_precision_generates():
    model = model_from_checkpoint(random_checkpoint()).bfloat16()
    [row] = Decoder(model).generate([[1, 2, 3]], GenerationConfig(9, logprobs=True))
    ids = torch.tensor([[1, 2, 3, *row[0].ids]])
    with torch.no_grad():
        expected = model(ids)[0, 2:-1].float().log_softmax(-1).gather(1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(row[0].logprobs), expected, rtol=0, atol=BFLOAT16_NATS)


@pytest.mark.parametrize("temperature", [1e-30, 1e-50])
def test_a_tiny_temperature_takes_the_most_likely_token(temperature: float) -> None:
    model = model_from_checkpoint(random_checkpoint())
    ids = torch.from_numpy(random_ids(TINY, length=4))
    greedy = generate(model, ids, max_new_tokens=5)
    assert (generate(model, ids, max_new_tokens=5, temperature=temperature) == greedy).all()


def test_a_finished_row_does_not_make_others_slide(model: GPT2, monkeypatch: pytest.MonkeyPatch):
    """Otherwise, a long row that ends at once would cause a prefill for every token of the short row."""
    long, short = [[*range(TINY.n_positions - 2)], [7]]
    [[first]] = Decoder(model).generate([long], GenerationConfig(1))
    config = GenerationConfig(30, slide=True, eos_token_id=(first.ids[0],))
    [[alone]] = Decoder(model).generate([short], config)
    began = []
    begin = Decoder._prefill
    monkeypatch.setattr(Decoder, "_prefill", lambda *args: began.append(args) or begin(*args))
    [[ended], [going_on]] = Decoder(model).generate([long, short], config)
    assert (ended.ids, going_on.ids) == (first.ids, alone.ids)
    assert len(began) == 2


def test_a_prompt_longer_than_the_positions_can_slide(model: GPT2):
    prompt = torch.from_numpy(random_ids(TINY, batch=1, length=TINY.n_positions + 5))
    ids = generate(model, prompt, max_new_tokens=3, slide=True)
    kept = prompt[:, -TINY.n_positions // 2 :]
    assert torch.equal(ids[:, -3:], generate(model, kept, max_new_tokens=3)[:, -3:])


def test_ids_of_a_narrow_dtype_are_widened(model: GPT2):
    narrow = (PROMPTS % 250).to(torch.uint8)
    assert torch.equal(generate(model, narrow, max_new_tokens=9), generate(model, narrow.long(), max_new_tokens=9))


def test_the_modes_of_submodules_are_restored(model: GPT2):
    model.train()
    model.h[1].eval()
    generate(model, PROMPTS, max_new_tokens=2)
    assert model.training and model.h[0].attn.training and not model.h[1].attn.training
    model.eval()
