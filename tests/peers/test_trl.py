"""The loss of direct preference optimization, compared with TRL's DPOTrainer on the same batch.

Runs where TRL is installed: `.venv/bin/python -m pip install trl==1.16.0`.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from support.models import random_state
from support.peft_adapters import model_of_transformers

import bridge
from bridge import IGNORE_INDEX, GPT2Config
from gpt2_jax import GPT2, dpo_loss, sequence_log_probs

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
trl = pytest.importorskip("trl")

AGREEMENT = 1e-6
BETA = 0.3
CONFIG = GPT2Config(vocab_size=1024, n_positions=16, n_embd=24, n_layer=2, n_head=3)


def pairs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids, attention mask and completion mask [2 B, T] of three chosen answers, then three rejected ones."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, CONFIG.vocab_size, (6, 12))
    ids[3:, :4] = ids[:3, :4]
    lengths, at = np.array([12, 9, 7, 8, 12, 6]), np.arange(12)
    attended = (at < lengths[:, None]).astype(np.int64)
    return ids, attended, attended * (at >= 4)


def test_the_loss_is_that_of_trl(tmp_path: Path) -> None:
    import datasets
    import torch
    import transformers

    warnings.simplefilter("ignore")
    bridge.save(bridge.load("bundled"), tmp_path / "bundled", format="huggingface")
    states = [random_state(CONFIG, seed=seed) for seed in (0, 1)]
    policy, reference = model_of_transformers(CONFIG), model_of_transformers(CONFIG)
    reference.load_state_dict(
        {f"transformer.{name}": torch.from_numpy(array) for name, array in states[1].items()}
        | {"lm_head.weight": torch.from_numpy(states[1]["wte.weight"])}
    )
    trainer = trl.DPOTrainer(
        model=policy,
        ref_model=reference,
        args=trl.DPOConfig(str(tmp_path / "out"), use_cpu=True, bf16=False, beta=BETA, report_to="none"),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2),
        processing_class=transformers.AutoTokenizer.from_pretrained(tmp_path / "bundled"),
    )
    ids, attended, answers = pairs()
    names = ("input_ids", "attention_mask", "completion_mask")
    inputs = {name: torch.tensor(array) for name, array in zip(names, (ids, attended, answers), strict=True)}
    policy.eval()
    with torch.no_grad():
        theirs = float(trainer.compute_loss(trainer.model, inputs))

    labels = np.where(answers[:, 1:] == 1, ids[:, 1:], IGNORE_INDEX)
    batch = {"input_ids": jnp.asarray(ids[:, :-1]), "labels": labels, "attention_mask": attended[:, :-1]}
    model = GPT2(CONFIG)
    log_probs = [sequence_log_probs(model, bridge.to_flax(state, CONFIG), batch) for state in states]
    (chosen, rejected), (base_chosen, base_rejected) = (jnp.split(values, 2) for values in log_probs)
    losses = dpo_loss(chosen, rejected, base_chosen, base_rejected, beta=BETA).losses
    assert float(losses.min()) != float(losses.max())
    assert abs(float(losses.mean()) - theirs) < AGREEMENT * max(1.0, theirs)
