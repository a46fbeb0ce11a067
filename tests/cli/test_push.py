"""`gpt2 push`: dry runs, uploads to a stand-in for the hub, and what belongs to other weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support.commands import CONFIG, run
from support.hub_server import TOKEN, Hub, running_hub
from support.models import huggingface_directory, random_state
from support.training_runs import RECIPE, data_for

import bridge
from gpt2_jax.training import TrainState, make_optimizer, resolve_config
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.directory import create
from gpt2_jax.training.run.identity import description
from gpt2_jax.training.run.outcome import finish

pytest.importorskip("huggingface_hub")
pytestmark = [
    pytest.mark.usefixtures("quick_compilation"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's own
]
MODEL_FILES = {"README.md", "config.json", "model.safetensors", "vocab.json", "merges.txt"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with running_hub(monkeypatch, tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a model without biases, as training leaves it, with random weights."""
    folder = tmp_path_factory.mktemp("trained")
    data = data_for(RECIPE, folder)
    config, path = resolve_config(RECIPE, data), folder / "run"
    create(path, config, data)
    with Checkpoints(path, keep_last=9) as checkpoints:
        for step, loss in {3: 2.5, 6: 2.25}.items():
            tree = bridge.to_flax(random_state(config.model, seed=step), config.model, stacked=True)
            params = jax.tree.map(jnp.array, tree)
            state = TrainState(jnp.int32(step), params, make_optimizer(config.optimizer, 6).init(params))
            checkpoints.save(state, loss)
    records = [{"step": k, "train_loss": 5.0 - k / 2, "val_loss": 4.0 - k / 4} for k in range(7)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    finish(path, description(config, data), 6, None)
    return path


def test_without_a_token_nothing_is_sent(
    model: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    report = tmp_path / "report.json"
    assert run("push", model, "me/mine", "--license", "mit", "--private", "--json", report) == 0
    shown = capsys.readouterr().out
    assert server.requests == []
    assert "dry run: nothing was sent to 'me/mine'; there is no token for the hub" in shown
    found = json.loads(report.read_text())
    assert {*found["files"]} == MODEL_FILES
    assert found["url"] is None
    assert found["files"]["model.safetensors"] == (model / "model.safetensors").stat().st_size
    assert found["card"].strip() in shown
    assert f"model.safetensors: {found['files']['model.safetensors']:,} bytes" in shown
    assert bridge.fingerprint(bridge.load(model).tensors) in found["card"]


def test_a_dry_run_sends_nothing_with_a_token(model: Path, server: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("push", model, "me/mine", "--license", "mit", "--dry-run") == 0
    assert server.requests == []
    assert "dry run: nothing was sent" in capsys.readouterr().out


def test_the_repository_is_a_checkpoint(
    model: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("push", model, "me/mine", "--license", "mit", "--private") == 0
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    repository = server.repositories["me/mine"]
    assert repository.private
    assert {*repository.files} == MODEL_FILES | {".gitattributes"}
    for name, content in repository.files.items():
        (tmp_path / "got").mkdir(exist_ok=True)
        (tmp_path / "got" / name).write_bytes(content)
    got, sent = bridge.load(tmp_path / "got"), bridge.load(model)
    assert bridge.fingerprint(got.tensors) == bridge.fingerprint(sent.tensors)
    assert got.tokenizer().fingerprint == sent.tokenizer().fingerprint
    assert f"uploaded: {server.url}/me/mine/commit/" in printed.out


def test_a_second_push_replaces_its_own_card_and_no_other(
    model: Path, server: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("push", model, "me/mine", "--license")
    assert run(*arguments, "mit") == 0
    assert run(*arguments, "other") == 2
    assert "would be replaced" in capsys.readouterr().err
    assert run(*arguments, "other", "--overwrite") == 0
    files = server.repositories["me/mine"].files
    assert b'license: "other"' in files["README.md"]
    files["README.md"] = b"written by hand"
    assert run(*arguments, "mit", "--overwrite") == 2
    assert "--replace-card" in capsys.readouterr().err
    assert files["README.md"] == b"written by hand"
    assert run(*arguments, "mit", "--overwrite", "--replace-card") == 0
    assert b'license: "mit"' in files["README.md"]


def test_the_card_of_a_run_has_its_recipe(trained: Path, server: Hub, tmp_path: Path) -> None:
    report, evaluation = tmp_path / "report.json", tmp_path / "eval.json"
    (tmp_path / "text.txt").write_text("line 1 says that 1 times 1 is 1;\n")
    assert run("eval", trained, "--data", tmp_path / "text.txt", "--json", evaluation) == 0
    assert run("push", trained, "me/mine", "--license", "mit", "--evaluation", evaluation, "--json", report) == 0
    card = server.repositories["me/mine"].files["README.md"].decode()
    assert json.loads(report.read_text())["card"] == card
    stored = json.loads((trained / "run.json").read_text())
    assert f"`{stored['data']}`" in card
    assert "| learning_rate | `0.01` |" in card
    assert "checkpoint of step 6, after batches with 288 tokens. Its validation loss is 2.2500" in card
    assert "| 6 | 2 | 2.5 |" in card
    assert f"perplexity per token | {json.loads(evaluation.read_text())['perplexity']:.4f} |" in card
    assert str(trained.parent) not in card
    exported = bridge.load(trained / "export")
    assert f"`{bridge.fingerprint(exported.tensors)}`" in card


def test_the_export_of_a_run_has_the_same_card(trained: Path, tmp_path: Path) -> None:
    cards = []
    for k, source in enumerate((trained, trained / "export")):
        report = tmp_path / f"{k}.json"
        assert run("push", source, "me/mine", "--license", "mit", "--dry-run", "--json", report) == 0
        cards.append(json.loads(report.read_text())["card"])
    assert cards[0] == cards[1]
    assert "checkpoint of step 6" in cards[0]


def test_an_earlier_checkpoint_has_the_losses_up_to_it(trained: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert run("push", trained / "checkpoints" / "3", "me/mine", "--license", "mit", "--dry-run", "--json", report) == 0
    card = json.loads(report.read_text())["card"]
    assert "checkpoint of step 3" in card and "Its validation loss is 2.5000" in card
    assert "| 3 | 3.5 | 3.25 |" in card and "\n| 4 |" not in card


def test_a_certificate_is_shared_with_its_model(server: Hub) -> None:
    certificate = bridge.BUNDLED / "parity.certificate"
    assert run("push", "bundled", "me/mine", "--license", "mit", "--certificate", certificate) == 0
    files = server.repositories["me/mine"].files
    assert files["parity.certificate"] == certificate.read_bytes()
    assert b"gpt2 verify mine --against mine/parity.certificate" in files["README.md"]


@pytest.mark.parametrize("flag", ["--certificate", "--evaluation"])
def test_evidence_of_other_weights_is_refused(
    flag: str, model: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = bridge.BUNDLED / "parity.certificate"
    if flag == "--evaluation":
        file = tmp_path / "eval.json"
        other = huggingface_directory(tmp_path / "other", CONFIG, seed=7)
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(model / name, other)
        assert run("eval", other, "--max-tokens", 20, "--json", file) == 0
    assert run("push", model, "me/mine", "--license", "mit", flag, file) == 2
    said = capsys.readouterr().err
    assert ("another model" if flag == "--certificate" else "other weights") in said
    assert server.requests == []


def test_an_upload_that_must_happen_needs_a_token(
    model: Path, server: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    assert run("push", model, "me/mine", "--license", "mit", "--no-dry-run") == 2
    assert "there is no token for the hub" in capsys.readouterr().err


BAD = {
    "no license": (("me/mine",), "--license"),
    "a license of two lines": (("me/mine", "--license", "mit\nx: y"), "must be an identifier"),
    "no owner": (("mine", "--license", "mit"), "must be OWNER/NAME"),
    "a path": (("../a/b", "--license", "mit"), "must be OWNER/NAME"),
    "both": (("me/mine", "--license", "mit", "--dry-run", "--no-dry-run"), "mutually exclusive"),
    "a card without overwriting": (("me/mine", "--license", "mit", "--replace-card"), "without --overwrite"),
    "a missing report": (("me/mine", "--license", "mit", "--evaluation", "{tmp}/no.json"), "cannot read"),
    "not a report": (("me/mine", "--license", "mit", "--evaluation", "{model}/config.json"), "is not a report"),
    "not a certificate": (("me/mine", "--license", "mit", "--certificate", "{model}/config.json"), "config.json"),
}


@pytest.mark.parametrize("why", BAD)
def test_bad_input_exits_with_2_and_sends_nothing(
    why: str, model: Path, server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, message = BAD[why]
    assert run("push", model, *(a.format(tmp=tmp_path, model=model) for a in arguments)) == 2
    printed = capsys.readouterr()
    assert message in printed.out + printed.err
    assert "Traceback" not in printed.out + printed.err
    assert server.requests == []
