"""Named training configurations: the recipes of `gpt2 train --preset NAME`."""

from __future__ import annotations

from collections.abc import Mapping

from bridge import GPT2_SIZES, GPT2Config
from gpt2_jax.training.config import OptimizerConfig, TrainConfig

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
    # Fine-tuning of a pretrained checkpoint, with --init-from.
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
    # The recipe of the bundled model (bridge/bundled): below 8 MB in float32, and its BPE encodes any text.
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
    # The four sizes of GPT-2, with nanoGPT's recipe for the smallest: 0.5M tokens per step.
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
"""Training configurations by name."""
