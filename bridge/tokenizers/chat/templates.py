"""The chat templates of a directory, found as transformers 5 finds them.

`chat_template.jinja` is the template `default`, and `additional_chat_templates/NAME.jinja` is the template NAME. If a
directory has neither, `chat_template` in `tokenizer_config.json` is used: one template, or a list of named ones.

Source: `PreTrainedTokenizerBase._from_pretrained` and `get_chat_template` of transformers 5, rewritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bridge.errors import TokenizerError, quoted
from bridge.storage.companions import MOST_TEMPLATE_BYTES, decoded, has_companion, read_companion, read_json_companion

CHAT_TEMPLATE = "chat_template.jinja"
CHAT_TEMPLATE_FOLDER = "additional_chat_templates"

DEFAULT = "default"
"""The name of the template that is used by default."""

_SUFFIX = ".jinja"
_SETTINGS, _FIELD = "tokenizer_config.json", "chat_template"
_MOST_FILES = 64
_LONGEST_NAME = 128
"""Limit for the name of a template, in bytes. It becomes the name of a file."""


@dataclass(frozen=True)
class ChatTemplate:
    """The text of a Jinja template, and its source."""

    text: str
    where: str
    """The file, for messages."""
    is_in_settings: bool = False
    """Whether it is in `tokenizer_config.json` and not in a file of its own."""

    def __post_init__(self) -> None:
        if len(self.text) > MOST_TEMPLATE_BYTES:
            raise TokenizerError(
                f"{self.where}: the chat template has more than {MOST_TEMPLATE_BYTES} characters, the limit"
            )


def chat_template_files(directory: Path) -> tuple[str, ...]:
    """Return the paths of the files in `additional_chat_templates`, relative to `directory` and with forward slashes.

    Raises `TokenizerError` if the folder cannot be listed or has too many templates.
    """
    folder = directory / CHAT_TEMPLATE_FOLDER
    if not folder.is_dir():
        return ()
    names = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(_SUFFIX):
                    names.append(f"{CHAT_TEMPLATE_FOLDER}/{entry.name}")
                if len(names) > _MOST_FILES:
                    raise TokenizerError(f"{quoted(folder)} has more than {_MOST_FILES} chat templates; remove some")
    except OSError as error:
        raise TokenizerError(f"cannot read {quoted(folder)}: {error.strerror}") from error
    return tuple(sorted(names))


def chat_template_file(name: str) -> str:
    """Return the path of the file for the template of this name, relative to its directory."""
    return CHAT_TEMPLATE if name == DEFAULT else f"{CHAT_TEMPLATE_FOLDER}/{name}{_SUFFIX}"


def read_chat_templates(directory: Path) -> dict[str, ChatTemplate]:
    """Return name -> template for the templates of a directory.

    Raises `TokenizerError` for files that cannot be read, and for templates that are not text.
    """
    files = {DEFAULT: CHAT_TEMPLATE} if has_companion(directory, CHAT_TEMPLATE) else {}
    files |= {Path(file).name.removesuffix(_SUFFIX): file for file in chat_template_files(directory)}
    if files:
        return {name: _of_file(directory, file) for name, file in files.items()}
    if not has_companion(directory, _SETTINGS):
        return {}
    return _of_settings(
        read_json_companion(directory, _SETTINGS, error=TokenizerError).get(_FIELD), quoted(directory / _SETTINGS)
    )


def select_chat_template(templates: Mapping[str, ChatTemplate], name: str | None, where: str) -> ChatTemplate:
    """Return the template of this name, or the default one.

    Raises `TokenizerError`, with `where` as a prefix, if there is no such template.
    """
    if not templates:
        raise TokenizerError(
            f"{where} has no chat template: neither {CHAT_TEMPLATE} nor {_FIELD} in {_SETTINGS}; add the file, or "
            "give the model a plain prompt"
        )
    if (found := templates.get(DEFAULT if name is None else name)) is not None:
        return found
    missing = "no default chat template" if name is None else f"no chat template {quoted(name)}"
    raise TokenizerError(
        f"{where} has {missing}; choose one of {', '.join(map(quoted, sorted(templates)))}, "
        f"or add {CHAT_TEMPLATE_FOLDER}/NAME.jinja beside the weights"
    )


def _of_file(directory: Path, file: str) -> ChatTemplate:
    where = quoted(directory / file)
    # transformers opens the file with universal newlines.
    text = decoded(read_companion(directory, file, error=TokenizerError), where, TokenizerError)
    return ChatTemplate(text.replace("\r\n", "\n").replace("\r", "\n"), where)


def _of_settings(value: Any, where: str) -> dict[str, ChatTemplate]:
    if not value:
        return {}
    if isinstance(value, str):
        return {DEFAULT: ChatTemplate(value, where, is_in_settings=True)}
    listed = [{"name": n, "template": t} for n, t in value.items()] if isinstance(value, dict) else value
    if not isinstance(listed, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("name"), str) and isinstance(entry.get("template"), str)
        for entry in listed
    ):
        raise TokenizerError(
            f"{where}: {_FIELD}={quoted(value)} is neither a template nor a list of objects with name and template"
        )
    if len(listed) > _MOST_FILES:
        raise TokenizerError(f"{where} has more than {_MOST_FILES} chat templates; remove some")
    for entry in listed:
        name = entry["name"]
        if not name or name != Path(name).name or not name.isprintable() or len(name.encode()) > _LONGEST_NAME:
            raise TokenizerError(f"{where}: {quoted(name)} is not a valid name of a chat template")
    return {
        entry["name"]: ChatTemplate(entry["template"], f"{where} ({quoted(entry['name'])})", is_in_settings=True)
        for entry in listed
    }
