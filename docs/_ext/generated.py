"""Replace each line `<!-- generated: NAME -->` of the reference with text generated from the code."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from support.public_configurations import PUBLIC
from support.public_text import PUBLISHED, TEXT

from bridge import GPT2Config
from bridge.config import config_diagnostics
from bridge.config_fields import MUST_BE, STATED, UNSUPPORTED
from gpt2_jax.cli import main
from gpt2_jax.cli.verbs import VERBS
from gpt2_jax.lora import LoRAConfig
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
    return "\n".join(_table(part) for part in (TrainConfig, OptimizerConfig, LoRAConfig, GPT2Config))


def _table(part: type) -> str:
    documented = ModuleAnalyzer.for_module(part.__module__).find_attr_docs()
    default = part()
    rows = [f"## {part.__name__}", "", "| field | flag | default | meaning |", "|---|---|---|---|"]
    for name in part.__dataclass_fields__:  # type: ignore[attr-defined]
        if name in ("model", "optimizer", "lora") and part is TrainConfig:
            continue
        flag = ("--lora-" if part is LoRAConfig else "--") + name.replace("_", "-")
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


def configuration_fields() -> str:
    """Return the tables of the fields that must equal the model's, and of those that require another computation."""
    stated: dict[str, list[str]] = {}
    for name, attribute in STATED.items():
        stated.setdefault(attribute, []).append(f"`{name}`")
    rows = ["| property of `GPT2Config` | fields that must equal it |", "|---|---|"]
    rows += [f"| `{attribute}` | {', '.join(names)} |" for attribute, names in stated.items()]
    required = ", ".join(f"`{name}`" for name in MUST_BE)
    rows += ["", f"These must be true if they are there: {required}.", ""]
    accepted: dict[str, list[str]] = {}
    for name, values in UNSUPPORTED.items():
        accepted.setdefault(", ".join(f"`{value!r}`" for value in values), []).append(f"`{name}`")
    rows += ["| fields that require another computation | also accepted |", "|---|---|"]
    rows += [f"| {', '.join(names)} | {values} |" for values, names in accepted.items()]
    return "\n".join(rows)


def public_configurations() -> str:
    """Return a table of the configurations that are tested, with what is reported about each."""
    rows = ["| model | particular | tokenizer | ids and generation settings | warning |", "|---|---|---|---|---|"]
    for name, (particular, fields) in PUBLIC.items():
        text, assigned = TEXT[name], "" if name in PUBLISHED else " (assigned)"
        warning = _cell("; ".join(config_diagnostics(fields)))
        kind = text.tokenizer.replace("_", " ") + assigned
        settings = _settings({**text.config, **(text.generation or {})})
        rows.append(f"| {name} | {particular} | {kind} | {settings} | {warning} |")
    return "\n".join(rows)


def _settings(settings: Mapping[str, Any]) -> str:
    """Return the settings, with tokens by their spelling."""
    named = {name: value for name, value in settings.items() if name[0] != "_" and name != "transformers_version"}
    shown = ", ".join(f"`{name}={json.dumps(value, ensure_ascii=False)}`" for name, value in named.items())
    return shown.replace("|", "\\|")


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return f"`{text}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


PARTS: Mapping[str, Callable[[], str]] = {
    "command-line": command_line,
    "configuration": configuration,
    "configuration-fields": configuration_fields,
    "public-configurations": public_configurations,
    "presets": presets,
}


def _replace(app: Sphinx, docname: str, source: list[str]) -> None:
    source[0] = _MARK.sub(lambda match: PARTS[match[1]](), source[0])


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", _replace)
    return {"parallel_read_safe": True}
