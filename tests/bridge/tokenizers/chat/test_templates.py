"""Which chat templates a directory has: those that transformers finds, or an error that names the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from support.chats import CONVERSATIONS, chat_tokenizer, read_chat_tokenizer
from support.refusals import within_budget
from transformers import AutoTokenizer

from bridge import TokenizerError
from bridge.storage.companions import MOST_TEMPLATE_BYTES
from bridge.tokenizers.chat.templates import read_chat_templates

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")

FOLDER = "additional_chat_templates"
NAMED = [{"name": "default", "template": "listed"}, {"name": "tool_use", "template": "listed tools"}]


def with_settings(directory: Path, value: Any) -> None:
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": value}))


# What is in `tokenizer_config.json`, in `chat_template.jinja`, and in the folder -> the names of the templates.
PLACES: dict[str, tuple[Any, str | None, dict[str, str], set[str]]] = {
    "file": (None, "file", {}, {"default"}),
    "settings": ("settings", None, {}, {"default"}),
    "list": (NAMED, None, {}, {"default", "tool_use"}),
    "file before settings": ("settings", "file\r\nof\rlines\n", {}, {"default"}),
    "folder before settings": (
        "settings",
        None,
        {"tool_use": "tools", "default": "own default"},
        {"default", "tool_use"},
    ),
    "file and folder": (NAMED, "file", {"rag": "in the folder"}, {"default", "rag"}),
    "default in the folder": (None, "file", {"default": "in the folder"}, {"default"}),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_templates_are_those_that_transformers_finds(tmp_path: Path, case: str) -> None:
    settings, file, folder, names = PLACES[case]
    chat_tokenizer(tmp_path, file)
    if settings is not None:
        with_settings(tmp_path, settings)
    for name, text in folder.items():
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / f"{name}.jinja").write_text(text)
    theirs = AutoTokenizer.from_pretrained(tmp_path).chat_template
    found = {name: template.text for name, template in read_chat_templates(tmp_path).items()}
    assert {*found} == names
    assert found == ({"default": theirs} if isinstance(theirs, str) else theirs)


def test_a_template_is_chosen_by_name(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, None)
    with_settings(tmp_path, NAMED)
    assert ours.apply_chat_template(CONVERSATIONS[0]) == "listed"
    assert ours.apply_chat_template(CONVERSATIONS[0], template="tool_use") == "listed tools"
    with pytest.raises(TokenizerError, match="no chat template 'rag'; choose one of 'default', 'tool_use'"):
        ours.apply_chat_template(CONVERSATIONS[0], template="rag")
    with_settings(tmp_path, NAMED[1:])
    with pytest.raises(TokenizerError, match="no default chat template; choose one of 'tool_use'"):
        ours.apply_chat_template(CONVERSATIONS[0])


def test_without_a_template_the_error_says_so(tmp_path: Path) -> None:
    ours = chat_tokenizer(tmp_path, None)
    with pytest.raises(TokenizerError, match=r"has no chat template: neither chat_template\.jinja nor"):
        ours.apply_chat_template(CONVERSATIONS[0])
    with pytest.raises(TokenizerError, match="has no chat template"):
        ours.encode_conversations([CONVERSATIONS[0]])


@pytest.mark.parametrize(
    "value",
    [5, True, ["x"], [{"name": "a"}], [{"name": 1, "template": "x"}], {"a": 1}, [{"name": "../a", "template": "x"}]],
)
def test_a_template_in_the_settings_must_be_text(tmp_path: Path, value: Any) -> None:
    chat_tokenizer(tmp_path, None)
    with_settings(tmp_path, value)
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json': "):
        read_chat_templates(tmp_path)


def long_file(directory: Path) -> None:
    (directory / "chat_template.jinja").write_text("x" * (MOST_TEMPLATE_BYTES + 1))


def long_setting(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    with_settings(directory, "x" * (MOST_TEMPLATE_BYTES + 1))


def not_utf8(directory: Path) -> None:
    (directory / "chat_template.jinja").write_bytes(b"\xff")


def pipe(directory: Path) -> None:
    (directory / FOLDER).mkdir()
    os.mkfifo(directory / FOLDER / "a.jinja")


def many(directory: Path) -> None:
    (directory / FOLDER).mkdir()
    for i in range(70):
        (directory / FOLDER / f"{i}.jinja").write_text("x")


def link_out(directory: Path) -> None:
    (directory.parent / "secret.jinja").write_text("secret")
    (directory / FOLDER).mkdir()
    (directory / FOLDER / "a.jinja").symlink_to(directory.parent / "secret.jinja")


def folder_link_out(directory: Path) -> None:
    (directory.parent / "secrets").mkdir()
    (directory.parent / "secrets" / "a.jinja").write_text("secret")
    (directory / FOLDER).symlink_to(directory.parent / "secrets")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (long_file, "larger than 131072 bytes"),
        (long_setting, "more than 131072 characters"),
        (not_utf8, "is not UTF-8"),
        (pipe, "is not a regular file"),
        (many, "more than 64 chat templates"),
        (link_out, "is a link out of the checkpoint's directory"),
        (folder_link_out, "is a link out of the checkpoint's directory"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    (tmp_path / "model").mkdir()
    chat_tokenizer(tmp_path / "model")
    damage(tmp_path / "model")
    with within_budget(), pytest.raises(TokenizerError, match=message):
        read_chat_templates(tmp_path / "model")
    assert read_chat_tokenizer(tmp_path / "model").encode("a") == [97], "the tokenizer is read without its templates"
