"""Replace each line `<!-- generated: NAME -->` of the reference with text generated from the code."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer

from bridge import GPT2Config
from gpt2_jax.cli import main
from gpt2_jax.cli.verbs import VERBS
from gpt2_jax.training import PRESETS, OptimizerConfig, TrainConfig
from gpt2_jax.training.config import flat

_MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)


def command_line() -> str:
    """Return the help of the command and of every verb, as printed."""
    verbs = "\n".join(f"## gpt2 {verb}\n\n```text\n{help_of(verb)}\n```\n" for verb in VERBS)
    return f"```text\n{help_of()}\n```\n\n{verbs}"


def help_of(*verb: str) -> str:
    """Return what `gpt2 --help` or `gpt2 VERB --help` prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        try:
            main([*verb, "--help"])
        except SystemExit as error:
            if error.code:
                raise RuntimeError(f"gpt2 {' '.join(verb)} --help exits with {error.code}") from None
    return re.sub(r"\x1b\[[\d;]*m", "", out.getvalue()).strip("\n")


def configuration() -> str:
    """Return a table per dataclass: field, default, meaning."""
    return "\n".join(_table(part) for part in (TrainConfig, OptimizerConfig, GPT2Config))


def _table(part: type) -> str:
    documented = ModuleAnalyzer.for_module(part.__module__).find_attr_docs()
    default = part()
    rows = [f"## {part.__name__}", "", "| field | flag | default | meaning |", "|---|---|---|---|"]
    for name in part.__dataclass_fields__:  # type: ignore[attr-defined]
        if name in ("model", "optimizer") and part is TrainConfig:
            continue
        flag = "--" + name.replace("_", "-")
        meaning = " ".join(documented.get((part.__name__, name), [])).strip()
        rows.append(f"| `{name}` | `{flag}` | {_shown(getattr(default, name))} | {_cell(meaning)} |")
    return "\n".join([*rows, ""])


def presets() -> str:
    """Return a table of the fields in which the presets differ from the default."""
    default = flat(TrainConfig())
    rows = ["| preset | values that differ from the defaults |", "|---|---|"]
    for name, preset in PRESETS.items():
        changed = {k: v for k, v in flat(preset).items() if v != default[k] and k != "preset"}
        rows.append(f"| `{name}` | {', '.join(f'`{k}`={_shown(v)}' for k, v in changed.items())} |")
    return "\n".join(rows)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


PARTS: Mapping[str, Callable[[], str]] = {
    "command-line": command_line,
    "configuration": configuration,
    "presets": presets,
}


def _replace(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda match: PARTS[match[1]](), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _replace)
    return {"parallel_read_safe": True}
