"""Render chat templates in a separate process, which runs the script `bridge.tokenizers.chat.sandbox`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

from bridge.errors import TokenizerError, install_command, quoted
from bridge.tokenizers.chat import sandbox
from bridge.tokenizers.chat.templates import ChatTemplate

Messages = Sequence[Mapping[str, Any]]
"""A conversation: objects with `role` and `content`. JSON must be able to represent them."""

_SAFE_JINJA = (3, 1, 6)
"""Earlier versions have known escapes from the sandbox."""
_ENVIRONMENT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME")
"""The variables that the process gets. Others may hold secrets."""


def render(template: ChatTemplate, conversations: Sequence[Messages], variables: Mapping[str, Any]) -> list[str]:
    """Return the text of each conversation.

    Args:
        variables: further variables of the template. JSON must be able to represent them.

    Raises:
        TokenizerError: jinja2 is not installed, a conversation is not valid, or the template fails or takes too much
            time or memory. The message names the file and the line of the template.
    """
    texts = []
    for text in render_each(template, conversations, variables):
        if isinstance(text, TokenizerError):
            raise text
        texts.append(text)
    return texts


def render_each(
    template: ChatTemplate, conversations: Sequence[Messages], variables: Mapping[str, Any]
) -> Iterator[str | TokenizerError]:
    """Yield the text of each conversation, or why the template cannot render it.

    The arguments and errors are those of `render`; it raises only if jinja2 is missing or a conversation is not valid.
    """
    require_jinja()
    request = as_json({"template": template.text, "variables": dict(variables)})
    lines = [as_json(_without_none(messages)) for messages in conversations]
    while lines:  # a process that exceeds its limits ends, and the next one continues
        done = _run_sandbox([request, *lines])
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        for answer in answers:
            yield answer["text"] if "text" in answer else _problem(template, answer)
        if len(answers) < len(lines):
            yield _ended(template, done.returncode)
        lines = lines[len(answers) + 1 :]


def _run_sandbox(lines: Sequence[str]) -> subprocess.CompletedProcess[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return subprocess.run(
        [sys.executable, "-P", sandbox.__file__],
        input="\n".join(lines).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(os.path.isabs, sys.path))},
        check=False,
    )


def _problem(template: ChatTemplate, answer: Mapping[str, Any]) -> TokenizerError:
    problem, detail, line = (answer[key] for key in ("problem", "detail", "line"))
    where = template.where + (f", line {line}" if line else "")
    return TokenizerError(f"{where}: the chat template {problem}" + (f": {quoted(detail, 400)}" if detail else ""))


def _ended(template: ChatTemplate, status: int) -> TokenizerError:
    why = (
        f"takes more than {sandbox.SECONDS} seconds"
        if status == -signal.SIGPROF
        else f"ended its process with the status {status}"
    )
    return TokenizerError(f"{template.where}: the chat template {why}; correct it, or use another template")


def require_jinja() -> None:
    """Raise `TokenizerError` if jinja2 is not installed or is too old."""
    try:
        found = metadata.version("jinja2")
    except metadata.PackageNotFoundError:
        raise TokenizerError(f"chat templates need jinja2; install it: {install_command('chat')}") from None
    if tuple(map(int, re.findall(r"\d+", found)[:3])) < _SAFE_JINJA:
        raise TokenizerError(
            f"jinja2 {found} has known security problems; install a newer version: {install_command('chat')}"
        )


def _without_none(messages: Messages) -> list[dict[str, Any]]:
    """Return the messages without fields that are None. transformers leaves them out too."""
    if isinstance(messages, str) or not messages or not all(isinstance(message, Mapping) for message in messages):
        raise TokenizerError(
            "a conversation must be a list of at least one message; a message must be an object with role and content"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def as_json(value: Any, *, ensure_ascii: bool = True) -> str:
    """Return messages or variables as one line of JSON. Raises `TokenizerError` if JSON cannot represent them."""
    try:
        return json.dumps(value, ensure_ascii=ensure_ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"a message, or a variable of the template, is not JSON: {quoted(error)}") from None
