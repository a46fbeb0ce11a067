"""The script that renders chat templates. `bridge.tokenizers.chat.rendering` starts it in a separate process.

A template is an untrusted program. Jinja's sandbox denies access to Python, but one expression can take any amount of
time or memory. The template therefore runs in a process with system limits and without its parent's environment.

The first line of standard input is `{"template": ..., "variables": ...}`. Each further line is the messages of one
conversation, and is answered with one line, `{"text": ...}` or `{"problem": ..., "detail": ..., "line": ...}`.

Source: `_cached_compile_jinja_template` in transformers' utils/chat_template_utils.py (version 5.23), rewritten.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from traceback import walk_tb
from typing import Any

SECONDS = 3
"""Processor time for one conversation."""
MOST_BYTES = 2**28
"""Address space of the process. Python and Jinja take 25 MB of it."""
MOST_CHARACTERS = 2**20
"""Length of a rendered conversation."""


def main() -> None:
    environment = sandboxed_environment()
    _limit_memory()
    request = json.loads(sys.stdin.readline())
    template = None
    for line in sys.stdin:
        _limit_time()
        try:
            template = template or environment.from_string(request["template"])
            answer: dict[str, Any] = {"text": _rendered(template, json.loads(line), request["variables"])}
        except Exception as error:
            answer = _described(error) | {"line": _line_of(error)}
        print(json.dumps(answer), flush=True)


def sandboxed_environment() -> Any:
    """Return Jinja's environment with the options, filters and functions that transformers gives a template."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The tags `generation` and `endgeneration`. They mark the assistant's text and do not change the output."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

        def _content(self, caller: Any) -> str:
            return caller()

    class PublicNamespace(Namespace):
        """A namespace that rejects private names, so that a template cannot imitate Python's own attributes."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace cannot have the private attribute {name!r}")
            Namespace.__setitem__(self, name, value)

    class RejectedMessages(TemplateError):
        pass

    def raise_exception(message: str) -> None:
        raise RejectedMessages(message)

    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
        "namespace": PublicNamespace,
    }
    return environment


def _limit_memory() -> None:
    import resource  # POSIX only

    resource.setrlimit(resource.RLIMIT_AS, (MOST_BYTES, MOST_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _limit_time() -> None:
    """Let the system end this process after `SECONDS` of processor time."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)


def _rendered(template: Any, messages: list[Any], variables: Mapping[str, Any]) -> str:
    pieces, length = [], 0
    for piece in template.generate(**{"tools": None, "documents": None, **variables, "messages": messages}):
        pieces.append(piece)
        length += len(piece)
        if length > MOST_CHARACTERS:
            raise OverflowError(f"the text is longer than {MOST_CHARACTERS} characters")
    return "".join(pieces)


def _described(error: Exception) -> dict[str, Any]:
    if isinstance(error, MemoryError):
        return {"problem": f"needs more than {MOST_BYTES // 2**20} MiB of memory", "detail": None}
    kind = type(error).__name__
    if kind == "RejectedMessages":
        return {"problem": "rejects the messages", "detail": str(error)}
    return {"problem": "failed", "detail": f"{kind}: {error}"}


def _line_of(error: Exception) -> int | None:
    """Return the line of the template that failed, or None if it is not known."""
    lines = [line for frame, line in walk_tb(error.__traceback__) if frame.f_code.co_filename == "<template>"]
    return lines[-1] if lines else getattr(error, "lineno", None)


if __name__ == "__main__":
    main()
