"""The files of a repository: damaged reports, local paths, and the directory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.models import SMALLEST, random_checkpoint
from support.refusals import within_budget

import bridge
from gpt2_jax.sharing import SharingError, prepare, read_evaluation, require_license, require_repo_id

REPORT: dict[str, Any] = {
    "generator": f"gpt2-bridge {bridge.__version__}",
    "data": "/home/me/input.txt",
    "loss": 2.5,
    "perplexity": 12.2,
    "bits_per_byte": None,
    "predicted_tokens": 9,
    "tokens": 10,
    "context": 4,
    "fingerprint": "f",
}


def written(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps({**REPORT, **changes}, indent=2))
    return path


def test_a_report_is_read(tmp_path: Path) -> None:
    found = read_evaluation(written(tmp_path / "eval.json"), {"f", "g"})
    assert found.data == "input.txt"
    assert found.metrics == {"loss": 2.5, "perplexity": 12.2}
    assert found.counts == {"tokens": 10, "predicted_tokens": 9, "context": 4}


DAMAGE: dict[str, tuple[Any, str]] = {
    "other weights": ({"fingerprint": "h"}, "other weights"),
    "a list as fingerprint": ({"fingerprint": [1]}, "other weights"),
    "text as loss": ({"loss": "2"}, "loss must be a number"),
    "true as loss": ({"loss": True}, "loss must be a number"),
    "a negative loss": ({"loss": -1}, "loss must be a number"),
    "no figures": ({"loss": None, "perplexity": None}, "has none of"),
    "another generator": ({"generator": "other 1"}, "is not a report"),
    "empty": (b"", "not valid JSON"),
    "a list": (b"[]", "must hold an object"),
    "another command": (b'{"generator": "gpt2-bridge 0.2.0", "checks": []}', "is not a report"),
    "deep": (b"[" * 60_000, "values"),
    "large": (b"{" + b" " * 2**20 + b"}", "is larger than"),
    "NaN": (b'{"loss": NaN}', "not a number in JSON"),
}


@pytest.mark.parametrize("why", DAMAGE)
def test_a_damaged_report_is_one_clear_error(why: str, tmp_path: Path) -> None:
    content, message = DAMAGE[why]
    file = tmp_path / "eval.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        written(file, **content)
    with within_budget(), pytest.raises(SharingError, match=message) as error:
        read_evaluation(file, {"f"})
    assert "eval.json" in str(error.value)


def test_local_paths_in_settings_are_left_out(tmp_path: Path) -> None:
    kept = {"task": "x", "url": "https://example.org/a", "sep_token": "/", "version": "1.0", "ratio": "a/b"}
    paths = {
        "_name_or_path": "clients/bank",
        "tokenizer_file": "tokenizer.json",
        "special_tokens_map_file": None,
        "posix": "/home/me/secret",
        "home": "~/secret",
        "here": "./secret",
        "above": ["x", {"inner": "../secret"}],
        "drive": "C:\\secret",
        "share": "\\\\host\\secret",
        "url of a file": "file:///secret",
        "inner": {"name_or_path": "secret"},
    }
    checkpoint = replace(random_checkpoint(SMALLEST), extra={**kept, **paths})
    export = prepare(checkpoint, "me/mine", tmp_path / "out", license="mit")
    assert {*export.left_out} == {f"{name} in config.json, which may be a local path" for name in paths}
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not fields.keys() & paths.keys() and fields.items() >= kept.items()
    assert bridge.load(tmp_path / "out").config == SMALLEST
    assert {*export.sizes()} == {"README.md", "config.json", "model.safetensors"}


def test_local_paths_in_settings_of_the_tokenizer_are_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    bridge.save(bridge.load("bundled"), source, format="huggingface")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    paths = {"tokenizer_file": "/home/me/secret.json", "special_tokens_map_file": "secret.json", "name_or_path": "me/x"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings | paths))
    export = prepare(bridge.load(source), "me/mine", tmp_path / "out", license="mit")
    assert len(export.left_out) == len(paths)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == settings


@pytest.mark.parametrize("name", ["mine", "a/b/c", "../mine", "/me/mine", "me/", "me/mine\n", ""])
def test_a_repository_has_an_owner_and_a_name(name: str) -> None:
    with pytest.raises(SharingError, match="OWNER/NAME"):
        require_repo_id(name)


@pytest.mark.parametrize("name", ["MIT", "mit\n", "", "-mit", 'mit"', "x" * 65])
def test_a_license_is_an_identifier(name: str) -> None:
    with pytest.raises(SharingError, match="--license"):
        require_license(name)
    require_license("cc-by-sa-4.0")
