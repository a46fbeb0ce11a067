"""Every kind of source, opened and read to batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from gpt2_jax.data import evaluation_batches, open_data, training_batches


def test_a_text_file_becomes_batches(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(50))
    (tmp_path / "text.txt").write_text(text)
    data = open_data(tmp_path / "text.txt", tokenizer="characters", cache=tmp_path / "cache")
    assert data.tokenizer is not None and data.validation is not None
    assert data.tokenizer.decode(data.train.read(0, len(data.train)).tolist()) == text[: int(0.9 * len(text))]
    batch = next(training_batches(data.train, batch_size=3, length=7, seed=5))
    np.testing.assert_array_equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
    assert sum(1 for _ in evaluation_batches(data.validation, batch_size=3, length=7)) > 1
