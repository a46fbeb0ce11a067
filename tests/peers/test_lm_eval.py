"""`gpt2_jax.harness` against lm-evaluation-harness's own model `hf`, on the same export and local tasks.

The harness is in a separate environment, because it needs many packages. `make test-peers` creates it and sets
LM_EVAL_PYTHON to its interpreter.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bridge

pytestmark = pytest.mark.peers

ROOT = Path(__file__).parents[2]
SAME = 1e-4
"""Tolerance for metrics, relative for perplexities. The harness sums log-probabilities in float32."""
SAME_NATS = 5e-4
"""Tolerance for the log-probability of one answer, of up to 2,000 nats."""

TASKS: dict[str, str] = {
    "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{context}}"
doc_to_target: " {{answer}}"
metric_list: [{metric: perplexity, aggregation: perplexity, higher_is_better: false}, {metric: acc}]
""",
    "continued": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n", "."], max_gen_toks: 24, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def write_tasks(folder: Path) -> None:
    text, rows = (bridge.BUNDLED / "validation.txt").read_text(encoding="utf-8"), random.Random(0)
    lines = [line for line in text.splitlines() if len(line) > 30]

    def shuffled(line: str) -> str:
        words = line.split()
        return " ".join(rows.sample(words, len(words)))

    data: dict[str, list[dict[str, Any]]] = {
        "choice": [
            {"context": lines[k] + "\n" * (k % 2), "choices": [lines[k + 1], shuffled(lines[k + 1])], "answer": 0}
            for k in range(0, 40, 2)
        ]
        + [{"context": "", "choices": ["ROMEO:", "Q:"], "answer": 0}]
        + [{"context": text[:4000], "choices": [" the", " king of the"], "answer": 0}],
        "rolling": [{"text": text[k * 3000 : k * 3000 + (200 if k else 3000)]} for k in range(4)],
        "last_word": [dict(zip(("context", "answer"), line.rsplit(" ", 1), strict=True)) for line in lines[50:60]],
        "continued": [{"context": line + "\n", "answer": ""} for line in [*lines[60:65], text[5000:9000]]],
    }
    for name, records in data.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        files = json.dumps({"test": str(folder / f"{name}.jsonl")})
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + TASKS[name])


@pytest.fixture(scope="module")
def python() -> str:
    if "LM_EVAL_PYTHON" not in os.environ:
        pytest.skip("LM_EVAL_PYTHON is not set to an interpreter with lm-eval; run make test-peers")
    return os.environ["LM_EVAL_PYTHON"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with an export, named as in the manual, and the tasks."""
    folder = tmp_path_factory.mktemp("lm_eval")
    bridge.save(bridge.load("bundled"), folder / "my-gpt2", format="huggingface")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    return folder


def run_in(place: Path, python: str, *arguments: str | Path) -> str:
    """Run Python in the environment of the harness, and return its output."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(place / "home")}
    environment = {**os.environ, **offline, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([python, *arguments], env=environment, capture_output=True, text=True, cwd=place)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def found(place: Path, python: str) -> dict[str, Any]:
    run_in(place, python, Path(__file__).with_name("lm_eval_scores.py"), "my-gpt2", "tasks", "results.json")
    return json.loads((place / "results.json").read_text())


def test_the_lines_in_the_manual_run(place: Path, python: str) -> None:
    text = (ROOT / "docs" / "how-to" / "lm-eval.md").read_text(encoding="utf-8")
    program = "\n".join(re.findall(r"^```py\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert program.count("simple_evaluate") == 2
    assert "perplexity" in run_in(place, python, "-c", program.replace("my_task", "last_word"))


def flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for inner in value:
            yield from flat(inner)
    else:
        yield value


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("task", TASKS)
def test_the_metrics_are_those_of_the_hugging_face_model(task: str, backend: str, found: dict[str, Any]) -> None:
    expected, ours = (found[model]["metrics"][task] for model in ("hf", backend))
    assert ours.keys() == expected.keys() and ours
    for name, value in expected.items():
        assert ours[name] == pytest.approx(value, rel=SAME if "perplexity" in name else 0, abs=SAME), name


@pytest.mark.parametrize("backend", ["jax", "torch"])
@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_that_of_the_hugging_face_model(task: str, backend: str, found: dict[str, Any]) -> None:
    """Log-probabilities up to rounding; generated texts, and whether an answer is greedy, exactly."""
    expected, ours = ([*flat(found[model]["answers"][task])] for model in ("hf", backend))
    assert len(ours) == len(expected)
    for own, theirs in zip(ours, expected, strict=True):
        if isinstance(theirs, float):
            assert own == pytest.approx(theirs, abs=SAME_NATS)
        else:
            assert own == theirs
    if task == "continued":
        assert all(isinstance(text, str) for text in ours) and sum(len(text) > 10 for text in ours) >= 4
    if task == "choice":
        assert 0 < found["hf"]["metrics"][task]["acc_norm,none"] < 1


ERRORS = """
import bridge
import pytest
from lm_eval.api.instance import Instance
from gpt2_jax.harness import HarnessLM

model = HarnessLM("my-gpt2", dtype="float32", batch_size="auto")
assert (model.batch_size, model.max_length) == (None, model.decoder.config.n_positions)
assert [HarnessLM("my-gpt2", batch_size=size).batch_size for size in (None, "auto:4", "16", 3)] == [None, None, 16, 3]
for size in ("auto:", "many", "0", -1, 2.5, "auto:4\\n"):
    with pytest.raises(bridge.BridgeError, match="must be a whole number of at least 1, auto, or auto:N"):
        HarnessLM("my-gpt2", batch_size=size)
def ask(**settings):
    return model.generate_until([Instance("generate_until", {}, ("To be", settings), 0)], disable_tqdm=True)
assert len(ask(max_gen_toks=5, do_sample=True, temperature=0.8, top_k=5)) == 1
with pytest.raises(bridge.BridgeError, match="num_beams"):
    ask(max_gen_toks=5, num_beams=2)
with pytest.raises(bridge.BridgeError, match="n_positions"):
    ask(max_gen_toks=model.max_length)
with pytest.raises(bridge.BridgeError, match="JAX_PLATFORMS"):
    HarnessLM("my-gpt2", device="cuda")
assert model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)], disable_tqdm=True) == [0.0]
"""


def test_settings_that_are_not_supported_are_refused(place: Path, python: str) -> None:
    run_in(place, python, "-c", ERRORS)
