"""Chat templates, in files of their own and in `tokenizer_config.json`. Rendering is not fuzzed: it takes a process."""

from __future__ import annotations

import json
import random
from pathlib import Path

from fuzz import json_damage
from support.chats import CHATML, LLAMA_2

import bridge
from bridge.tokenizers.chat.templates import read_chat_templates

SETTINGS = {
    "one": {"chat_template": CHATML, "eos_token": "<|im_end|>"},
    "list": {"chat_template": [{"name": "default", "template": CHATML}, {"name": "rag", "template": LLAMA_2}]},
}


def samples(folder: Path) -> list[Path]:
    for name, settings in SETTINGS.items():
        (folder / name).mkdir()
        (folder / name / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "files" / "additional_chat_templates").mkdir(parents=True)
    (folder / "files" / "chat_template.jinja").write_text(CHATML)
    (folder / "files" / "additional_chat_templates" / "rag.jinja").write_text(LLAMA_2)
    return [*(folder / name for name in SETTINGS), folder / "files"]


def mutable(source: Path) -> list[Path]:
    return sorted(path for path in source.rglob("*") if path.is_file())


def damage(content: bytes, file: Path, rng: random.Random) -> bytes:
    if file.suffix == ".json":
        return json_damage.damaged_json(content, rng)
    at = rng.randrange(len(content))
    return content[:at] + rng.randbytes(1) + content[at:]


def judge(source: Path) -> str:
    """Templates are refused, or are text under names that are the names of files."""
    try:
        templates = read_chat_templates(source)
    except bridge.BridgeError as error:
        assert str(error).isprintable()
        return "refused"
    for name, template in templates.items():
        assert name and Path(name).name == name
        template.text.encode()
    return "loaded"
