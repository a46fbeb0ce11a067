"""Sequence classifiers in both backends, compared with transformers' `GPT2ForSequenceClassification`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from support.commands import run
from support.models import TINY, huggingface_directory, random_checkpoint, random_state

import bridge
import gpt2_jax
import gpt2_torch
from bridge import CheckpointError, ConversionError, SequenceClassifier
from bridge.storage.tensors import LazyTensor
from gpt2_jax.parity import Check, checks_for, verify
from gpt2_jax.parity.backends import jax_gpt2, transformers_gpt2

ERROR = 1e-5  # of logits of about 1 in float32
LABELS = ["negative", "neutral", "positive"]
PAD = 256


def theirs(directory: Path, **fields: Any) -> Any:
    """Return a random classifier of transformers, which is saved in the directory."""
    labels = {"id2label": dict(enumerate(LABELS)), "label2id": {label: k for k, label in enumerate(LABELS)}}
    fields = {"pad_token_id": PAD, "bos_token_id": 0, "eos_token_id": 0, **labels, **fields}
    model = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**TINY.to_hf(fields)))
    state = {f"transformer.{name}": torch.from_numpy(array) for name, array in random_state(TINY).items()}
    torch.manual_seed(0)
    model.load_state_dict({**state, "score.weight": torch.randn_like(model.score.weight) / 5})
    model.eval().save_pretrained(directory)
    return model


def padded_ids() -> np.ndarray:
    """Return rows of lengths 17, 1 and 9, padded on the right, one of padding alone, and one padded on the left."""
    ids = np.random.default_rng(0).integers(0, PAD, (5, 17))
    for row, length in enumerate((17, 1, 9, 0)):
        ids[row, length:] = PAD
    ids[4, :8] = PAD
    return ids


def logits_of_torch(classifier: SequenceClassifier, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return gpt2_torch.model_from_classifier(classifier)(torch.from_numpy(ids)).numpy()


def logits_of_jax(classifier: SequenceClassifier, ids: np.ndarray) -> np.ndarray:
    model, params = gpt2_jax.model_from_classifier(classifier)
    return np.asarray(jax.jit(model.apply)({"params": params}, jnp.asarray(ids)))


def logits_of(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.from_numpy(ids)).logits.numpy()
    return logits


BACKENDS = pytest.mark.parametrize("logits", [logits_of_torch, logits_of_jax], ids=["torch", "jax"])


@BACKENDS
@pytest.mark.parametrize("untied", [False, True], ids=["tied", "untied"])
def test_the_logits_are_those_of_transformers(tmp_path: Path, logits: Any, untied: bool) -> None:
    model = theirs(tmp_path, tie_word_embeddings=not untied)
    classifier = bridge.load_classifier(tmp_path)
    assert (classifier.num_labels, classifier.pad_token_id) == (3, PAD)
    expected = logits_of(model, padded_ids())
    assert expected.shape == (5, 3) and np.abs(expected).max() > 0.5
    assert len({row.tobytes() for row in expected}) == 5
    assert np.abs(logits(classifier, padded_ids()) - expected).max() < ERROR


@BACKENDS
def test_without_a_padding_id_one_row_is_classified_and_several_are_refused(tmp_path: Path, logits: Any) -> None:
    model = theirs(tmp_path, pad_token_id=None)
    classifier = bridge.load_classifier(tmp_path)
    ids = padded_ids()
    assert np.abs(logits(classifier, ids[:1]) - logits_of(model, ids[:1])).max() < ERROR
    with pytest.raises(ValueError, match="several rows need a pad_token_id"):
        logits(classifier, ids)


def both_ways(classifier: SequenceClassifier, backend: str) -> SequenceClassifier:
    if backend == "torch":
        return gpt2_torch.classifier_from_model(gpt2_torch.model_from_classifier(classifier), classifier)
    return gpt2_jax.classifier_from_params(gpt2_jax.model_from_classifier(classifier)[1], classifier)


@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_keeps_every_bit_and_transformers_reads_it(tmp_path: Path, backend: str, dtype: str) -> None:
    model = theirs(tmp_path / "theirs").to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    before = bridge.load_classifier(tmp_path / "theirs")
    after = both_ways(before, backend)
    bridge.save_classifier(after, tmp_path / "ours")
    again, info = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, dtype="auto"
    )
    assert {name: [*keys] for name, keys in info.items() if keys} == {}
    assert again.config.id2label == dict(enumerate(LABELS)) and again.config.pad_token_id == PAD
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert before.score.dtype == {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}[dtype]


def test_the_module_of_jax_initializes_the_tree_of_the_bridge(tmp_path: Path) -> None:
    theirs(tmp_path)
    model, params = gpt2_jax.model_from_classifier(bridge.load_classifier(tmp_path))
    made = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)


def test_generated_labels_have_the_number_of_the_head(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs")
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    del stored["id2label"], stored["label2id"]
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stored))
    bridge.save_classifier(bridge.load_classifier(tmp_path / "theirs"), tmp_path / "ours")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "ours")
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


def test_ignored_fields_and_labels_that_do_not_fit_are_named(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs")
    assert bridge.load_classifier(tmp_path / "theirs").checkpoint.diagnostics == ()
    stored = json.loads((tmp_path / "theirs" / "config.json").read_text())
    changed = {**stored, "n_ctx": 7, "id2label": {"0": "bad", "1": "good"}}
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(changed))
    classifier = bridge.load_classifier(tmp_path / "theirs")
    [context, labels] = classifier.checkpoint.diagnostics
    assert "n_ctx" in context
    assert labels == "id2label of config.json does not name the 3 rows of score.weight; an export has LABEL_0, ..."
    model = gpt2_torch.model_from_classifier(classifier)
    again = gpt2_torch.classifier_from_model(model, like=classifier)
    assert again.checkpoint.diagnostics == (context, labels)


def test_what_is_not_a_classifier_is_refused(tmp_path: Path) -> None:
    path = huggingface_directory(tmp_path / "model", TINY)
    with pytest.raises(ConversionError, match=r"'.*model': score\.weight is missing; bridge\.load reads"):
        bridge.load_classifier(path)
    with pytest.raises(CheckpointError, match=r"has no config\.json beside weights in Hugging Face format"):
        bridge.load_classifier(tmp_path)
    theirs(tmp_path / "theirs")
    classifier = bridge.load_classifier(tmp_path / "theirs")
    for shape, dtype in (((3,), "f4"), ((3, 47), "f4"), ((0, 48), "f4"), ((3, 48), "i4")):
        with pytest.raises(ConversionError, match=r"it must be a float matrix \[labels, 48\]"):
            SequenceClassifier(classifier.checkpoint, LazyTensor.of(np.zeros(shape, dtype)))
    tree = classifier.to_flax()
    for wrong in ({**tree, "more": {}}, {"transformer": tree["transformer"]}, tree["transformer"]):
        with pytest.raises(ConversionError, match="must have exactly transformer and score/kernel"):
            classifier.with_flax(wrong)


def test_a_classifier_that_is_not_finite_is_written_only_on_request(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs")
    broken = SequenceClassifier(
        bridge.load_classifier(tmp_path / "theirs").checkpoint, LazyTensor.of(np.full((3, 48), np.inf, np.float32))
    )
    with pytest.raises(ConversionError, match=r"score\.weight has 144 values that are not finite"):
        bridge.save_classifier(broken, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]
    bridge.save_classifier(broken, tmp_path / "ours", allow_non_finite=True)
    assert np.isinf(bridge.load_classifier(tmp_path / "ours").score.read()).all()


def test_an_existing_directory_is_not_overwritten(tmp_path: Path) -> None:
    theirs(tmp_path / "theirs")
    shutil.copytree(tmp_path / "theirs", tmp_path / "kept")
    with pytest.raises(CheckpointError, match="exists"):
        bridge.save_classifier(bridge.load_classifier(tmp_path / "theirs"), tmp_path / "kept")
    same = [(tmp_path / d / "model.safetensors").read_bytes() for d in ("theirs", "kept")]
    assert same[0] == same[1]


# gpt2 verify


def check_of(directory: Path) -> Check:
    [check] = verify(bridge.load_classifier(directory), checks=("classification",), seq_len=12).checks
    return check


@pytest.mark.usefixtures("quick_compilation")
def test_verify_compares_the_logits_of_classes_with_padding_on_either_side(tmp_path: Path) -> None:
    theirs(tmp_path)
    check = check_of(tmp_path)
    assert check.passed and check.note == "4 rows, 3 classes"
    assert {m.name.split(", max")[0] for m in check.measurements} == {
        f"{dtype} logits of classes, padded {side}, {name} vs gpt2_torch"
        for dtype in ("fp64", "fp32")
        for side in ("left", "right")
        for name in ("gpt2_jax", "transformers")
    }
    assert all(0 < m.value <= (m.tolerance or 0) for m in check.measurements)


@pytest.mark.usefixtures("quick_compilation")
def test_verify_classifies_one_row_without_padding_and_works_without_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs(tmp_path, pad_token_id=None)
    monkeypatch.setattr(transformers_gpt2, "is_installed", lambda: False)
    check = check_of(tmp_path)
    assert check.passed
    assert [m.name.split(" logits")[0] for m in check.measurements] == ["fp64", "fp32"]
    assert check.note == (
        "one row, because the vocabulary has no pad_token_id; without a third opinion: transformers is not installed"
    )


def test_verify_chooses_the_checks_by_the_model(tmp_path: Path) -> None:
    theirs(tmp_path)
    classifier, language_model = bridge.load_classifier(tmp_path), random_checkpoint()
    assert {*checks_for(language_model)} ^ {*checks_for(classifier)} == {"prediction", "generation", "classification"}
    for model, names in (
        (classifier, ("prediction", "generation")),
        (language_model, ("classification",)),
    ):
        report = verify(model, checks=names, seq_len=4)
        assert all(check.skipped and check.note for check in report.checks) and not report.passed


def score_with_labels_reversed(patch: pytest.MonkeyPatch) -> None:
    right = SequenceClassifier.to_flax

    def wrong(self: SequenceClassifier) -> Any:
        tree = right(self)
        return {**tree, "score": {"kernel": tree["score"]["kernel"][:, ::-1]}}

    patch.setattr(SequenceClassifier, "to_flax", wrong)


def padding_is_classified(patch: pytest.MonkeyPatch) -> None:
    right = gpt2_jax.GPT2ForSequenceClassification
    patch.setattr(jax_gpt2, "GPT2ForSequenceClassification", lambda c, n, pad, *dtypes: right(c, n, pad - 1, *dtypes))


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("mistake", [score_with_labels_reversed, padding_is_classified])
def test_verify_detects_a_wrong_head(
    mistake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs(tmp_path)
    mistake(monkeypatch)
    arguments = ("--checks", "classification", "--seq-len", 8, "--json", tmp_path / "report.json")
    assert run("verify", tmp_path, *arguments) == 1
    assert "NOT the same function. Failed: classification." in capsys.readouterr().out
    [check] = json.loads((tmp_path / "report.json").read_text())["checks"]
    failed = [m for m in check["measurements"] if not m["passed"]]
    assert {m["name"].split(", ")[2] for m in failed} == {"gpt2_jax vs gpt2_torch"}
    assert failed[0]["location"].startswith("row ")


def test_a_new_classifier_has_the_weights_of_the_model_and_named_labels(tmp_path: Path) -> None:
    base = random_checkpoint(TINY)
    classifier = bridge.new_classifier(base, LABELS, pad_token_id=PAD, seed=3)
    bridge.save_classifier(classifier, tmp_path / "new")
    model = transformers.GPT2ForSequenceClassification.from_pretrained(tmp_path / "new")
    assert model.config.id2label == dict(enumerate(LABELS)) and model.config.pad_token_id == PAD
    assert torch.equal(model.transformer.h[1].attn.c_attn.weight, torch.tensor(base.tensors["h.1.attn.c_attn.weight"]))
    assert abs(float(model.score.weight.detach().std()) / TINY.initializer_range - 1) < 0.25
    assert np.abs(logits_of_jax(classifier, padded_ids()) - logits_of(model, padded_ids())).max() < ERROR


@pytest.mark.parametrize(("labels", "pad"), [([], None), (["a", "a"], None), (["a"], 257)])
def test_labels_and_padding_that_cannot_be_are_refused(labels: list[str], pad: int | None) -> None:
    with pytest.raises(ConversionError, match=r"labels=|pad_token_id=257: the vocabulary has 257"):
        bridge.new_classifier(random_checkpoint(TINY), labels, pad_token_id=pad)
