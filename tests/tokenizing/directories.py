"""Random directories of tokenizer files, as all versions of transformers and users' scripts write them.

Most combinations of roles, flags and files occur, because tokenizer files often contradict each other.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from support.tokenizers_for_tests import END
from tokenizing.kinds import byte_level_model, write_json, write_vocab_and_merges

from bridge.tokenizers.added_tokens import ROLES

CONTENTS = ("<a>", "<b>", "<pad>", "</s>", "[SEP]", "cat", " dog", "é", "的", "Ġthe", "the", "\n", "<unk>", "<mask>")

TEXTS = (
    "Hello world",
    f" the cat  dog {END} x",
    "".join((*CONTENTS, END)),
    " ".join((*CONTENTS, END)),
    "<a> <b>\n<pad>cat concat the-cat\n\n É é",
    "的<img>  <a>   ",
    "",
    "<mask> cat</s>[SEP]  ",
)
"""Texts with all added tokens, beside each other and apart."""

_EXTRA = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("lstrip", "rstrip", "single_word", "normalized")
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_NORMALIZERS = (
    *(None, None, None),
    {"type": "NFC"},
    {"type": "Lowercase"},
    {"type": "Prepend", "prepend": "Q"},
    {"type": "Strip", "strip_left": True, "strip_right": True},
)


class _Directory:
    """One directory: which tokens have roles, which are added, and how the files describe them."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.vocab, self.merges = byte_level_model()
        contents = [*CONTENTS]
        draw.shuffle(contents)
        self.roles = {role: self._role(contents) for role in ROLES if draw.random() < 0.4}
        self.image = contents.pop() if draw.random() < 0.15 else None
        self.extra = [contents.pop() for _ in range(draw.randrange(3))]
        ordinary = [contents.pop() for _ in range(draw.randrange(3))]
        special = {END, *self.roles.values(), *self.extra, *([self.image] if self.image else [])}
        new = sorted(t for t in (special | {*ordinary}) if t not in self.vocab)
        draw.shuffle(new)
        self.ids = {token: len(self.vocab) + i for i, token in enumerate(new)}
        self.ids |= {t: self.vocab[t] for t in sorted(special | {*ordinary}) if t in self.vocab}
        if draw.random() < 0.3:
            del self.ids[END]
        self.flags = {t: {flag: draw.random() < 0.25 for flag in _FLAGS} for t in (*sorted(special), *ordinary)}
        self.special = special
        self.name_of_extra = draw.choice(_EXTRA)
        self.has_objects = draw.random() < 0.3

    def _role(self, contents: list[str]) -> str:
        return END if self.draw.random() < 0.4 else contents.pop()

    def object(self, content: str, **more: Any) -> dict[str, Any]:
        return {"content": content, **self.flags[content], **more}

    def value(self, content: str, **more: Any) -> Any:
        """Return a role's token as the files of roles describe it: a string or an object."""
        changed = self.draw.random() < 0.1
        flags = {flag: self.draw.random() < 0.25 for flag in _FLAGS} if changed else {}
        return self.object(content, **flags, **more) if self.has_objects else content

    def settings(self, classes: tuple[str, ...]) -> dict[str, Any]:
        draw, settings = self.draw, dict[str, Any]()
        if draw.random() < 0.7:
            settings["tokenizer_class"] = draw.choice(classes)
        if draw.random() < 0.5:
            described = {i: self.object(t, special=t in self.special) for t, i in self.ids.items()}
            settings["added_tokens_decoder"] = {str(i): described[i] for i in sorted(described)}
        settings |= {role: self.value(token, __type="AddedToken") for role, token in self.roles.items()}
        settings |= {role: None for role in ROLES if role not in self.roles and draw.random() < 0.15}
        if self.image:
            settings["image_token"] = draw.choice((self.image, {"content": self.image}, self.object(self.image)))
        if self.extra and draw.random() < 0.8:
            settings[self.name_of_extra] = draw.choice((self.extra, self.extra, {"image_token": self.extra[0]}))
        flags = ("add_bos_token", "add_eos_token", "add_prefix_space")
        settings |= {flag: draw.random() < 0.5 for flag in flags if draw.random() < 0.3}
        return {key: settings[key] for key in draw.sample([*settings], len(settings))}

    def special_tokens_map(self) -> dict[str, Any]:
        found = {role: self.value(token) for role, token in self.roles.items() if self.draw.random() < 0.8}
        if self.draw.random() < 0.5:
            found[self.draw.choice(_EXTRA)] = self.extra
        return {key: found[key] for key in self.draw.sample([*found], len(found))}

    def tokenizer_json(self) -> dict[str, Any]:
        draw = self.draw
        around = {"type": "RobertaProcessing", "sep": [END, self.vocab[END]], "cls": [END, self.vocab[END]]}
        added = [{"id": i, **self.object(t, special=t in self.special)} for t, i in self.ids.items()]
        return {
            "version": "1.0",
            "padding": draw.choice((None, None, {**_PADDING, "pad_token": draw.choice((END, "<pad>"))})),
            "truncation": None,
            "added_tokens": sorted(added, key=lambda token: token["id"]),
            "normalizer": draw.choice(_NORMALIZERS),
            "pre_tokenizer": {**_BYTE_LEVEL, "add_prefix_space": draw.random() < 0.3, "use_regex": draw.random() < 0.9},
            "post_processor": draw.choice(
                (None, _BYTE_LEVEL, around | {"trim_offsets": True, "add_prefix_space": False})
            ),
            "decoder": draw.choice((_BYTE_LEVEL, _BYTE_LEVEL, {"type": "Sequence", "decoders": [_BYTE_LEVEL]}, None)),
            "model": {
                "type": "BPE",
                "dropout": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "unk_token": draw.choice((None, None, END)),
                "continuing_subword_prefix": draw.choice((None, "")),
                "end_of_word_suffix": draw.choice((None, "")),
                "ignore_merges": draw.random() < 0.2,
                "vocab": self.vocab,
                "merges": [" ".join(merge) for merge in self.merges],
            },
        }


_PADDING = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}


def write_random_files(directory: Path, seed: int) -> None:
    """Write the tokenizer files of one random directory."""
    draw = random.Random(seed)
    made = _Directory(draw)
    has_vocab, has_json = draw.choice(((True, False), (False, True), (True, True)))
    classes = ("GPT2Tokenizer", "GPT2TokenizerFast")
    classes += ("PreTrainedTokenizerFast", "TokenizersBackend") if has_json else ()
    write_json(directory / "tokenizer_config.json", made.settings(classes))
    if draw.random() < 0.4:
        write_json(directory / "special_tokens_map.json", made.special_tokens_map())
    if draw.random() < 0.35:
        write_json(directory / "added_tokens.json", made.ids)
    if has_json:
        write_json(directory / "tokenizer.json", made.tokenizer_json())
    if has_vocab:
        write_vocab_and_merges(directory)
