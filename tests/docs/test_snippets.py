"""Every Python snippet and every `gpt2` line of the README and the manual works as printed.

Snippets of one page run in order, in a directory with the files that the pages name. Lines that this machine cannot
run are only parsed by the command's own parser; `ONLY_PARSED` has the reasons. `make docs` executes the cells of the
tutorials; here their commands are only parsed.
"""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.commands import run
from support.documents import PAGES, Line, commands_of, name_of, python_of

import bridge
from bridge.containers.safetensors import write_file
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from gpt2_jax import cli

pytest.importorskip("torch")

EXECUTED = [line for page in PAGES for line in commands_of(page)]
CELLS = [line for page in PAGES for line in commands_of(page, notebook_cells=True)]

HUB, CLOUD, DEVICES, LARGE, LONG, TERMINAL, TPU = (
    "it downloads from the Hugging Face hub",
    "it needs machines of a cloud or a cluster",
    "it needs several devices; the tutorial eight-devices runs the same",
    "it trains 124M parameters or more",
    "it takes minutes; tests/cli runs it at smaller sizes",
    "it reads prompts from a terminal",
    "it needs the TPU's compiler",
)
ONLY_PARSED: tuple[tuple[str, str], ...] = (
    ("convert gpt2 ", HUB),
    ("--license mit --private", "it uploads to the Hugging Face hub"),
    ("--init-from gpt2 ", HUB),
    ("--distributed", CLOUD),
    ("plan --devices", "it needs eight devices before JAX starts; tests/plan runs it in a separate process"),
    ("--mesh fsdp", DEVICES),
    ("--preset gpt2", LARGE),
    ("--topology", TPU),
    ("--interactive", TERMINAL),
    ("--batch-invariant", "it needs one thread before JAX starts; tests/cli runs it in a separate process"),
    ("--certificate", LONG),
    ("--public-key", "it needs a key and two signatures; tests/cli/test_verify_certificate.py makes them"),
    ("bench", LONG),
    ("demo", LONG),
)
"""(part of a line, the reason for only parsing it)."""

SMALLER = {
    "train": "--n-layer 1 --n-embd 32 --n-head 2 --n-positions 32 --seq-len 16 --batch-size 2 --num-microbatches 1 "
    "--max-steps 2 --warmup-steps 1 --eval-every 2 --eval-batches 1 --checkpoint-every 1 --sample-tokens 0",
    "resume": "--accept-changes --max-steps 3 --eval-batches 1 --sample-tokens 0",
    "finetune": "--seq-len 16 --batch-size 2 --max-steps 2 --warmup-steps 1 --eval-every 2 --eval-batches 1 "
    "--checkpoint-every 1 --sample-tokens 0",
    "verify": "--batch-size 1 --seq-len 16",
    "diff": "--batch-size 1 --seq-len 16",
    "generate": "--max-new-tokens 4",
}
"""Flags appended to a line so that it runs in seconds. The flags of the line itself are parsed too."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, quick_compilation: None) -> Path:
    """Write the files that the pages name: models, one with another head, an adapter, texts, prompts, and a run."""
    root = tmp_path_factory.mktemp("pages")
    bundled = bridge.load("bundled")
    bridge.save(bundled, root / "my-gpt2", format="huggingface")
    shutil.copy(bridge.BUNDLED / "parity.certificate", root / "my-gpt2.certificate")
    shutil.copytree(root / "my-gpt2", root / "my-chat-gpt2")
    (root / "my-chat-gpt2" / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        encoding="utf-8",
    )
    shutil.copytree(root / "my-gpt2", root / "my-classifier")
    weights = root / "my-classifier" / "model.safetensors"
    head = LazyTensor.of(np.ones((2, bundled.config.n_embd), np.float32))
    weights.unlink()
    write_file(weights, LazyTensorMap({**bundled.tensors.entries, "score.weight": head}), {"format": "pt"})
    factors = np.zeros((8, bundled.config.n_embd), np.float32), np.zeros((3 * bundled.config.n_embd, 8), np.float32)
    bridge.save_lora(bridge.LoRA.of({"h.0.attn.c_attn": factors}, alpha=16), root / "my-adapter", base_model="my-gpt2")
    nanogpt = bundled.with_activation("gelu")
    bridge.save(nanogpt, root / "ckpt.pt", format="nanogpt")
    text = (bridge.BUNDLED / "validation.txt").read_text(encoding="utf-8")
    (root / "input.txt").write_text(text[:20_000], encoding="utf-8")
    (root / "pairs.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 20, encoding="utf-8")
    (root / "questions.csv").write_text("question,answer\n" + "Who?,I\n" * 20, encoding="utf-8")
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (root / "chats.jsonl").write_text(f"{json.dumps({'messages': chat})}\n" * 20, encoding="utf-8")
    (root / "articles").mkdir()
    with gzip.open(root / "articles" / "one.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(f"{json.dumps({'body': line})}\n" for line in text[:20_000].splitlines())
    (root / "my-text").mkdir()
    (root / "my-text" / "one.txt").write_text(text[:20_000], encoding="utf-8")
    sources = (("plays", "my-text", 0.7), ("pairs", "pairs.jsonl", 0.3))
    (root / "mixture.toml").write_text("".join(f"[{n}]\npath = '{path}'\nweight = {w}\n" for n, path, w in sources))
    (root / "prompts.txt").write_text("ROMEO:\nJULIET:\n", encoding="utf-8")
    train = f"--init-from my-gpt2 --data my-text --out runs/mine --cache tokens {SMALLER['finetune']}".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert run("train", *train) == 0
    return root


@pytest.fixture
def place(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the files, and make the copy the working directory."""
    shutil.copytree(files, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def reason_not_to_run(line: Line) -> str | None:
    text = " ".join(line.args) + " "
    return next((reason for part, reason in ONLY_PARSED if part in text), None)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Callable[[Line], None]:
    """Parse a line with the real parser, without running its verb."""
    parsed: list[str] = []

    def only_parsed(verb: Callable[..., Any]) -> Callable[..., int]:
        @functools.wraps(verb)
        def record(*args: Any, **kwargs: Any) -> int:
            parsed.append(verb.__name__)
            return 0

        return record

    load_verb = cli.load_verb
    monkeypatch.setattr(cli, "load_verb", lambda name, words, **options: only_parsed(load_verb(name, words)))

    def check(line: Line) -> None:
        parsed.clear()
        assert run(*line.args) == 0
        assert len(parsed) == 1

    return check


def test_there_are_snippets_and_lines() -> None:
    assert len(EXECUTED) > 40
    assert len(CELLS) > 4
    assert sum(bool(python_of(page).strip()) for page in PAGES) > 6


@pytest.mark.parametrize("line", [*EXECUTED, *CELLS], ids=str)
def test_every_line_has_valid_flags(line: Line, parse: Callable[[Line], None]) -> None:
    parse(line)


def test_an_unknown_flag_is_found(parse: Callable[[Line], None]) -> None:
    with pytest.raises(AssertionError):
        parse(Line("", "", ("inspect", "my-gpt2", "--no-such-flag")))


def test_every_reason_is_used() -> None:
    for part, _ in ONLY_PARSED:
        assert any(part in " ".join(line.args) + " " for line in EXECUTED), part


@pytest.mark.docs
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("line", [line for line in EXECUTED if reason_not_to_run(line) is None], ids=str)
def test_every_line_runs(line: Line, place: Path) -> None:
    verb, text = line.args[0], " ".join(line.args)
    smaller = SMALLER.get(verb, "")
    if "--against" in text:
        smaller = ""  # the certificate has the tokens
    elif verb == "verify" and "--checks" not in text:
        smaller += " --checks logits round-trip prediction"  # all of them: tests/parity/test_bundled.py
    if verb == "train":
        smaller = SMALLER["resume" if "--resume" in text else "finetune" if "--init-from" in text else "train"]
    expected = (0, 1) if verb == "diff" else (0,)  # 1: the checkpoints are different
    assert run(*line.args, *smaller.split(), *(["--cache", "tokens"] if verb == "train" else [])) in expected


@pytest.mark.docs
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("page", [page for page in PAGES if python_of(page).strip()], ids=name_of)
def test_every_snippet_runs(page: Path, place: Path) -> None:
    namespace: dict[str, Any] = {"__name__": name_of(page)}
    exec(compile(python_of(page), str(page), "exec"), namespace)
