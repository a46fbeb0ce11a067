"""`gpt2 diff`: the verdict and the exit code for every pair of formats, and for each kind of difference."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.commands import run
from support.models import SMALLEST, random_checkpoint, random_state
from support.tokenizers_for_tests import write_byte_tokenizer

import bridge
from bridge import Checkpoint, GPT2Config
from bridge.optimizer_state import AdamWState

pytestmark = pytest.mark.usefixtures("quick_compilation")

CONFIG = replace(SMALLEST, vocab_size=257, n_positions=16, n_inner=None)
NANOGPT = replace(CONFIG, activation_function="gelu")
UNTIED = replace(CONFIG, tie_word_embeddings=False)
FORMATS = ("huggingface", "flax", "flax_msgpack", "llmc", "gguf")
FORMATS_WITH_GELU = ("huggingface", "flax", "flax_msgpack", "nanogpt")
QUICK = ("--batch-size", 1, "--seq-len", 8)

State = dict[str, np.ndarray]


def saved(directory: Path, state: State | None = None, config: GPT2Config = CONFIG, **changes: Any) -> Path:
    """Write a Hugging Face directory with a tokenizer."""
    checkpoint = Checkpoint.of(random_state(config) if state is None else state, config)
    bridge.save(replace(checkpoint, **changes), directory, format="huggingface", allow_non_finite=True)
    write_byte_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model in every format as NAME, and with the other GELU as gelu-NAME."""
    root = tmp_path_factory.mktemp("formats")
    for prefix, config, names in (("", CONFIG, FORMATS), ("gelu-", NANOGPT, FORMATS_WITH_GELU)):
        source = bridge.load(saved(root / f"{prefix}source", config=config))
        for name in names:
            bridge.save(source, root / f"{prefix}{name}", format=name)
    return root


PAIRS = [
    *itertools.combinations_with_replacement(FORMATS, 2),
    *itertools.combinations_with_replacement([f"gelu-{name}" for name in FORMATS_WITH_GELU], 2),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_model_is_the_same_in_every_pair_of_formats(
    first: str, second: str, formats: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diff", formats / first, formats / second) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(("Identical: ", "The same function: "))
    assert first != second or last.startswith("Identical: ")


def test_a_file_without_a_tokenizer_is_compared_without_it(
    formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bridge.save(bridge.load(formats / "gelu-source"), tmp_path / "ckpt.pt", format="nanogpt")
    assert run("diff", formats / "gelu-source", tmp_path / "ckpt.pt") == 0
    assert "tokenizer: not compared: B has none" in capsys.readouterr().out


def flipped_bit(state: State) -> None:
    state["h.0.mlp.c_fc.weight"].view(np.uint32)[3, 5] ^= 1


def transposed_projection(state: State) -> None:
    state["h.1.attn.c_proj.weight"] = np.ascontiguousarray(state["h.1.attn.c_proj.weight"].T)


def five_rows(state: State) -> None:
    state["wte.weight"][[7, 8, 9, 20, 200]] += 0.5


def swapped_layers(state: State) -> None:
    for name in [name for name in state if name.startswith("h.0.")]:
        other = name.replace("h.0.", "h.1.")
        state[name], state[other] = state[other], state[name]


def not_a_number(state: State) -> None:
    state["ln_f.bias"][2] = np.nan


WEIGHTS: dict[str, tuple[Callable[[State], None], str]] = {
    "one bit": (flipped_bit, "h.0.mlp.c_fc.weight"),
    "a transpose": (transposed_projection, "transposed"),
    "five rows": (five_rows, "5 rows: 7-9, 20, 200"),
    "swapped layers": (swapped_layers, "layer 0 of A is layer 1 of B"),
    "NaN": (not_a_number, "NaN or infinite: 0 in A, 1 in B"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_difference_of_weights_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected = WEIGHTS[name]
    state = random_state(CONFIG)
    change(state)
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", state)
    assert run("diff", a, b, "--no-function") == 1
    shown = capsys.readouterr().out
    assert expected in shown
    assert shown.splitlines()[-1] == "Different: tensors."


CONFIGS = {
    "layer_norm_epsilon": replace(CONFIG, layer_norm_epsilon=1e-6),
    "activation_function": replace(CONFIG, activation_function="relu"),
    "n_head": replace(CONFIG, n_head=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_difference_of_the_configuration_is_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", config=CONFIGS[name])
    assert run("diff", a, b, *QUICK) == 1
    shown = capsys.readouterr().out
    assert name in shown and "changes the function" in shown
    assert "tensors: 28 identical" in shown
    assert "h.0, by " in shown
    assert shown.splitlines()[-1] == "Different: configuration, function."


def with_another_end(directory: Path) -> None:
    (directory / "tokenizer_config.json").write_text('{"eos_token": "!"}')


def with_another_default(directory: Path) -> None:
    (directory / "generation_config.json").write_text('{"do_sample": true, "top_k": 7}')


def with_a_chat_template(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("{{ messages }}")


TEXTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "another end": (with_another_end, "eos token", "tokenizer, generation settings"),
    "another default": (with_another_default, "top_k", "generation settings"),
    "a chat template": (with_a_chat_template, "default", "chat templates"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_difference_of_the_text_is_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, expected, parts = TEXTS[name]
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    change(b)
    assert run("diff", a, b) == 1
    shown = capsys.readouterr().out
    assert expected in shown
    assert shown.splitlines()[-1] == f"Different: {parts}. The models are identical."


def test_other_merges_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(bridge.BUNDLED, tmp_path / "b")
    header, *merges = (tmp_path / "b" / "merges.txt").read_text().splitlines()
    (tmp_path / "b" / "merges.txt").write_text("\n".join([header, *reversed(merges)]))
    assert run("diff", "bundled", tmp_path / "b") == 1
    shown = capsys.readouterr().out
    assert "strings with different ids: " in shown
    assert shown.splitlines()[-1] == "Different: tokenizer. The models are identical."


def test_a_copy_in_bfloat16_is_equal_up_to_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {name: array.astype(ml_dtypes.bfloat16) for name, array in random_state(CONFIG).items()}
    assert run("diff", saved(tmp_path / "a"), saved(tmp_path / "b", state), *QUICK, "--json", tmp_path / "r.json") == 1
    shown = capsys.readouterr().out
    assert "tensors: 28 equal up to dtype" in shown and "... and 16 more" in shown
    report = json.loads((tmp_path / "r.json").read_text())
    assert {tensor["status"] for tensor in report["tensors"]["tensors"]} == {"rounded"}
    assert len(report["tensors"]["tensors"]) == 28
    assert report["function"]["first_departure"] == "drop"


def test_a_resized_vocabulary_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = saved(tmp_path / "a")
    bridge.save(bridge.resize_vocabulary(bridge.load(a), 260), tmp_path / "b", format="huggingface")
    assert run("diff", a, tmp_path / "b", *QUICK) == 1
    shown = capsys.readouterr().out
    assert "B has 3 more rows; the 257 common rows are identical" in shown
    assert "the logits are compared over the 257 tokens that both vocabularies have" in shown
    assert shown.splitlines()[-1] == "Different: tensors. The logits agree within float32 rounding on this text."


def test_permuted_heads_are_the_same_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state, D, H, K = random_state(CONFIG), CONFIG.n_embd, CONFIG.n_head, CONFIG.head_size
    for name, axis, shape in (
        ("c_attn.weight", 2, (D, 3, H, K)),
        ("c_attn.bias", 1, (3, H, K)),
        ("c_proj.weight", 0, (H, K, D)),
    ):
        state[f"h.1.attn.{name}"] = np.flip(state[f"h.1.attn.{name}"].reshape(shape), axis).reshape(
            state[f"h.1.attn.{name}"].shape
        )
    assert run("diff", saved(tmp_path / "a"), saved(tmp_path / "b", state), *QUICK) == 0
    shown = capsys.readouterr().out
    assert "layer 1: the heads of A are 1, 0 of B (the same function)" in shown
    assert shown.splitlines()[-1].startswith("The same function: ")


def test_an_untied_head_with_equal_values_is_the_same_function(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = random_state(CONFIG)
    untied = saved(tmp_path / "b", {**state, "lm_head.weight": state["wte.weight"]}, UNTIED)
    assert run("diff", saved(tmp_path / "a"), untied, *QUICK) == 0
    assert "only B has an untied head" in capsys.readouterr().out
    other = saved(tmp_path / "c", {**state, "lm_head.weight": state["wte.weight"] + 1}, UNTIED)
    assert run("diff", tmp_path / "a", other, "--no-function") == 1
    assert "lm_head.weight" in capsys.readouterr().out


def test_a_changed_moment_of_the_optimizer_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = random_checkpoint(NANOGPT)
    for name, change in (("a.pt", 0.0), ("b.pt", 1.0)):
        moments = {name: np.square(array) for name, array in checkpoint.tensors.items()}
        changed = {**moments, "h.1.ln_2.weight": moments["h.1.ln_2.weight"] + np.float32(change)}
        bridge.save(replace(checkpoint, optimizer=AdamWState(5, changed, moments)), tmp_path / name, format="nanogpt")
    assert run("diff", tmp_path / "a.pt", tmp_path / "a.pt") == 0
    assert "Identical" in capsys.readouterr().out
    assert run("diff", tmp_path / "a.pt", tmp_path / "b.pt") == 1
    shown = capsys.readouterr().out
    assert "exp_avg of h.1.ln_2.weight" in shown
    assert shown.splitlines()[-1] == "Different: optimizer state. The models are identical."


def test_flags_read_each_side(formats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bridge.save(bridge.load(formats / "gelu-source"), tmp_path / "ckpt.pt", format="nanogpt")
    assert run("diff", tmp_path / "ckpt.pt", formats / "source", "--a.source-activation", "gelu_new") == 0
    assert run("diff", formats / "source", tmp_path / "ckpt.pt", "--b.source-activation", "gelu_new") == 0
    assert run("diff", formats / "source", tmp_path / "ckpt.pt", "--no-function") == 1
    assert "activation_function" in capsys.readouterr().out


BAD = {
    "a missing source": ("diff", "{a}", "{tmp}/nowhere"),
    "damaged weights": ("diff", "{a}", "{damaged}"),
    "one source": ("diff", "{a}"),
    "two texts": ("diff", "{a}", "{a}", "--text", "x", "--text-file", "{a}/config.json"),
    "a missing text": ("diff", "{a}", "{a}", "--text-file", "{tmp}/nowhere"),
    "a text that is not read": ("diff", "{a}", "{a}", "--text", "x", "--no-function"),
    "a base for no adapter": ("diff", "{a}", "{a}", "--b.base", "{a}"),
    "a report over an input": (
        "diff",
        "{a}",
        "{a}/model.safetensors",
        "--json",
        "{a}/model.safetensors",
        "--overwrite",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_exits_with_2(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, damaged = saved(tmp_path / "a"), saved(tmp_path / "damaged")
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    places = {"a": a, "damaged": damaged, "tmp": tmp_path, "weights": a / "model.safetensors"}
    assert run(*(part.format(**places) for part in BAD[name])) == 2
    printed = capsys.readouterr()
    assert (printed.out + printed.err).strip() and "Traceback" not in printed.err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_json_report_has_every_part(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    not_a_number(state)
    report = tmp_path / "report.json"
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b", state)
    assert run("diff", a, b, "--no-function", "--json", report) == 1
    found = json.loads(report.read_text())
    assert [*found] == [
        *("generator", "a", "b", "verdict", "different", "config", "extra", "tokenizer", "generation"),
        *("chat_templates", "tensors", "optimizer", "function", "function_not_run", "environment"),
    ]
    assert (found["verdict"], found["different"]) == ("different", ["tensors"])
    [tensor] = [tensor for tensor in found["tensors"]["tensors"] if tensor["status"] != "identical"]
    assert (tensor["relative_l2"], tensor["max_difference"], tensor["not_finite"]) == (None, None, [0, 1])
