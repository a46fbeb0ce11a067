"""Run local tasks in lm-evaluation-harness, with a checkpoint as its model `hf` and in both backends.

python lm_eval_scores.py CHECKPOINT TASKS_FOLDER RESULTS.json

Each .yaml file in the folder is a task, whose data are in the .jsonl file of the same name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

import bridge
import gpt2_jax.harness  # registers gpt2-bridge
import gpt2_torch


def models(checkpoint: str) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return name -> the arguments of `simple_evaluate` for a model."""
    loaded = bridge.load(checkpoint)
    decoder = gpt2_torch.Decoder(gpt2_torch.model_from_checkpoint(loaded))
    return {
        "hf": ("hf", {"pretrained": checkpoint, "dtype": "float32", "device": "cpu"}),
        "jax": ("gpt2-bridge", {"pretrained": checkpoint}),
        "torch": (gpt2_jax.harness.HarnessLM.of(decoder, loaded.tokenizer(), batch_size=3), {}),
    }


def results(model: Any, arguments: dict[str, Any], folder: Path) -> dict[str, Any]:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, arguments, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True
    )
    metrics = {name: {k: v for k, v in found["results"][name].items() if isinstance(v, float)} for name in names}
    answers = {name: [sample["resps"] for sample in found["samples"][name]] for name in names}
    return {"metrics": metrics, "answers": answers}


def main(checkpoint: str, folder: str, output: str) -> None:
    found = {name: results(*arguments, Path(folder)) for name, arguments in models(checkpoint).items()}
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
