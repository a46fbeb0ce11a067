"""Files beside the weights: a conversion keeps each one unchanged, or names it as left out."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support.models import TINY, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer
from tokenizing.kinds import KINDS, ROWS

import bridge
from bridge import CheckpointError, Tokenizer, TokenizerError
from bridge.storage.atomic_writes import replace_files
from bridge.tokenizers.chat.templates import read_chat_templates
from bridge.tokenizers.readers.nanogpt import META, from_meta

CONFIG = replace(TINY, n_inner=None, activation_function="gelu_new", layer_norm_epsilon=1e-5)
"""A model that every format can store, with another activation for nanoGPT."""

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def companions(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and path.name != "config.json" and not path.name.startswith(("model", "flax_model", "ckpt"))
    }


@pytest.mark.parametrize("kind", ["old_style_with_added_tokens", "new_style_with_added_tokens", "chinese_wordpiece"])
def test_every_companion_is_carried_unchanged(tmp_path: Path, kind: str) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=ROWS))
    KINDS[kind](model)
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 4], "do_sample": true}')
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_bytes(b"{{ tools }}\r\n")
    for name in ("spiece.model", "tokenizer.model"):
        (model / name).write_bytes(b"\x0a\xff not text")
    before = companions(model)
    for format in ("flax", "huggingface", "nanogpt"):
        source = bridge.load(model).with_activation("gelu") if format == "nanogpt" else bridge.load(model)
        assert bridge.save(source, tmp_path / format, format=format) == ()
        assert companions(tmp_path / format) == before
        assert bridge.load(tmp_path / format).tokenizer().fingerprint == bridge.load(model).tokenizer().fingerprint
        bridge.save(source, tmp_path / format, format=format, overwrite=True)
        assert companions(tmp_path / format) == before


def test_a_file_of_another_program_among_the_templates_is_kept(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", CONFIG)
    (tmp_path / "model" / "additional_chat_templates").mkdir()
    (tmp_path / "model" / "additional_chat_templates" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="'additional_chat_templates/'"):
        bridge.save(random_checkpoint(CONFIG), model, format="huggingface", overwrite=True)
    with pytest.raises(CheckpointError, match="holds files that this command does not write"):
        replace_files(model, {"additional_chat_templates/a.jinja": "x", "notes.txt": "y"})
    assert (model / "additional_chat_templates" / "notes.txt").read_text() == "mine"


def test_templates_and_settings_beside_a_tokenizer_in_the_weights_are_carried(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=256))
    write_byte_tokenizer(model)
    templates = [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "{{ documents }}\n"}]
    (model / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    (model / "generation_config.json").write_text('{"top_k": 3}')
    bridge.save(bridge.load(model), tmp_path / "gguf", format="gguf")
    [sentence] = bridge.save(bridge.load(model), tmp_path / "m.gguf", format="gguf")
    assert "store generation_config.json, the chat template in tokenizer_config.json;" in sentence
    assert bridge.save(bridge.load(tmp_path / "gguf"), tmp_path / "back", format="huggingface") == ()
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"top_k": 3}'
    found = read_chat_templates(tmp_path / "back")
    assert {name: template.text for name, template in found.items()} == {
        "default": TEMPLATE,
        "rag": "{{ documents }}\n",
    }


@pytest.mark.parametrize(
    "change",
    [
        lambda path: (path / "tokenizer_config.json").write_text('{"add_prefix_space": true}'),
        lambda path: (path / "merges.txt").write_text(_reordered((path / "merges.txt").read_text())),
    ],
    ids=["prefix space", "order of merges"],
)
def test_files_beside_a_gguf_that_give_other_ids_are_not_carried(
    tmp_path: Path, change: Callable[[Path], object]
) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=ROWS))
    KINDS["old_style"](model)
    bridge.save(bridge.load(model), tmp_path / "gguf", format="gguf")
    change(tmp_path / "gguf")
    source = bridge.load(tmp_path / "gguf")
    [unused] = bridge.save(source, tmp_path / "out", format="huggingface")
    assert "merges.txt" in unused and "which the source's tokenizer does not use" in unused
    text = "the quick brown fox says that it is here"
    assert bridge.load(tmp_path / "out").tokenizer().encode(text) == source.tokenizer().encode(text)


def _reordered(merges: str) -> str:
    """Put the last merge of two single letters before all others."""
    first, *lines = merges.splitlines()
    last = max(i for i, line in enumerate(lines) if len(line) == 3)
    return "\n".join([first, lines.pop(last), *lines, ""])


def test_a_single_file_is_written_without_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=256))
    (model / META).write_bytes(b"damaged")

    def unreadable() -> Tokenizer:
        raise TokenizerError("it is of another kind")

    for checkpoint in (bridge.load(model), replace(bridge.load(model), own_tokenizer=unreadable)):
        bridge.save(checkpoint, tmp_path / "m.bin", format="llmc", overwrite=True)
        with pytest.raises(TokenizerError):
            bridge.save(checkpoint, tmp_path / "out", format="huggingface")
        assert not (tmp_path / "out").exists()


def test_a_single_file_names_what_it_leaves_out(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=256))
    write_byte_tokenizer(model)
    (model / "chat_template.jinja").write_text(TEMPLATE)
    (model / "generation_config.json").write_text("{}")
    checkpoint = bridge.load(model)
    [sentence] = bridge.save(checkpoint.with_activation("gelu"), tmp_path / "m.pt", format="nanogpt")
    names = "vocab.json, merges.txt, chat_template.jinja, generation_config.json"
    assert sentence == f"a single file cannot store {names}; write a directory to keep it"
    [sentence] = bridge.save(checkpoint, tmp_path / "m.gguf", format="gguf")
    assert "store chat_template.jinja, generation_config.json;" in sentence, "the tokenizer is in the file"
    [sentence] = bridge.save(
        bridge.load(tmp_path / "m.gguf").with_activation("gelu"), tmp_path / "n.pt", format="nanogpt"
    )
    assert "the tokenizer inside the source" in sentence


def test_files_beside_a_gguf_are_carried_if_they_are_its_tokenizer(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=ROWS))
    KINDS["with_plain_added_tokens"](model)
    (model / "generation_config.json").write_text('{"eos_token_id": 3}')
    bridge.save(bridge.load(model), tmp_path / "gguf", format="gguf")
    bridge.save(bridge.load(tmp_path / "gguf"), tmp_path / "back", format="huggingface")
    assert companions(tmp_path / "back") == companions(model)
    for name in companions(model).keys() - {"generation_config.json"}:
        (tmp_path / "gguf" / name).unlink()
    KINDS["chinese_wordpiece"](tmp_path / "gguf")
    bridge.save(bridge.load(tmp_path / "gguf"), tmp_path / "own", format="huggingface")
    assert "vocab.txt" not in companions(tmp_path / "own")
    assert (tmp_path / "own" / "generation_config.json").read_text() == '{"eos_token_id": 3}'
    text = "the é dog<user>bot"
    assert bridge.load(tmp_path / "own").tokenizer().encode(text) == bridge.load(model).tokenizer().encode(text)


@pytest.mark.parametrize("format", ["huggingface", "flax", "flax_msgpack", "gguf", "nanogpt"])
def test_what_stands_beside_a_gguf_is_carried_or_named(tmp_path: Path, format: str) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=256))
    write_byte_tokenizer(model)
    (tmp_path / "gguf").mkdir()
    bridge.save(bridge.load(model), tmp_path / "gguf" / "m.gguf", format="gguf")
    carried = {"generation_config.json": '{"eos_token_id": [5, 6]}', "chat_template.jinja": TEMPLATE}
    for name, content in {**carried, "vocab.txt": "of another tokenizer"}.items():
        (tmp_path / "gguf" / name).write_text(content)
    source = bridge.load(tmp_path / "gguf").with_activation("gelu" if format == "nanogpt" else "gelu_new")
    left_out = bridge.save(source, tmp_path / "out", format=format)
    assert left_out == ("vocab.txt, which the source's tokenizer does not use",)
    assert companions(tmp_path / "out").items() >= {name: text.encode() for name, text in carried.items()}.items()
    found = bridge.load(tmp_path / "out")
    assert found.tokenizer().fingerprint == source.tokenizer().fingerprint
    assert bridge.generation_defaults(found, found.tokenizer()).eos_token_ids == (5, 6)
    [lost, unused] = bridge.save(source.with_activation("gelu_new"), tmp_path / "n.gguf", format="gguf")
    assert "chat_template.jinja, generation_config.json;" in lost
    assert unused == left_out[0]


# nanoGPT's meta.pkl

CHARACTERS = sorted(set("hello, world\n"))
IDS = {character: i for i, character in enumerate(CHARACTERS)}


def write_meta(directory: Path, **changes: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    meta = {"vocab_size": len(IDS), "itos": {i: c for c, i in IDS.items()}, "stoi": IDS, **changes}
    (directory / META).write_bytes(pickle.dumps(meta))


@pytest.mark.parametrize("place", ["out", "data/hello"])
def test_nanogpts_characters_are_found_where_its_sample_script_looks(tmp_path: Path, place: str) -> None:
    config = replace(CONFIG, vocab_size=len(IDS), activation_function="gelu")
    made = replace(
        bridge.load(huggingface_directory(tmp_path / "hf", config)), progress={"config": {"dataset": "hello"}}
    )
    (tmp_path / "out").mkdir()
    bridge.save(made, tmp_path / "out" / "ckpt.pt", format="nanogpt")
    write_meta(tmp_path / place)
    found = bridge.load(tmp_path / "out")
    tokenizer = found.tokenizer()
    assert tokenizer.kind == "characters" and tokenizer.encode("hello") == [IDS[c] for c in "hello"]
    assert tokenizer.fingerprint == bridge.character_tokenizer("hello, world\n").fingerprint
    bridge.save(found, tmp_path / "converted", format="huggingface")
    assert bridge.load(tmp_path / "converted").tokenizer().fingerprint == tokenizer.fingerprint
    assert (tmp_path / "converted" / META).exists() == (place == "out")
    assert bridge.save(bridge.load(tmp_path / "converted"), tmp_path / "back", format="nanogpt") == ()
    assert (tmp_path / "back" / META).exists() == (place == "out")  # nanoGPT reads no other file
    if place == "out":
        write_meta(tmp_path / "converted", stoi={**IDS, "h": IDS["e"], "e": IDS["h"]}, itos=None)
        [unused] = bridge.save(bridge.load(tmp_path / "converted"), tmp_path / "other", format="nanogpt")
        assert unused == "meta.pkl, which the source's tokenizer does not use"
    (tmp_path / "out" / "chat_template.jinja").write_text(TEMPLATE)
    (tmp_path / "out" / "tokenizer_config.json").write_text("{}")
    left_out = bridge.save(bridge.load(tmp_path / "out"), tmp_path / "with template", format="huggingface")
    assert left_out == ("tokenizer_config.json, which the source's tokenizer does not use",)
    assert bridge.load(tmp_path / "with template").tokenizer().fingerprint == tokenizer.fingerprint
    assert (tmp_path / "with template" / "tokenizer.json").exists()
    assert (tmp_path / "with template" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"stoi": 3}, "has no table stoi"),
        ({"stoi": {"ab": 0}, "itos": {0: "ab"}}, "'ab' is not a single character"),
        ({"stoi": {"a": "0"}, "itos": {"0": "a"}}, "the id of 'a' is '0'"),
        ({"stoi": {"a": [0]}}, "the id of 'a' is"),
        ({"stoi": {"a": 1}}, "stoi and itos do not belong together"),
        ({"stoi": print}, "refers to 'builtins.print'"),
    ],
)
def test_another_meta_is_refused_and_runs_no_code(tmp_path: Path, changes: dict[str, object], says: str) -> None:
    write_meta(tmp_path, **changes)
    with pytest.raises(TokenizerError, match=says):
        from_meta(tmp_path, {})


def test_a_dataset_name_cannot_leave_the_data_directory(tmp_path: Path) -> None:
    write_meta(tmp_path / "secret")
    (tmp_path / "out").mkdir()
    for dataset in ("../secret", "/etc", "..", 3, None):
        assert from_meta(tmp_path / "out", {"config": {"dataset": dataset}}) is None


def test_a_tokenizer_of_another_class_is_never_openais(tmp_path: Path) -> None:
    model = huggingface_directory(tmp_path / "model", replace(CONFIG, vocab_size=50257))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tokenizer_class": "BertTokenizer"}))
    with pytest.raises(TokenizerError, match="names the tokenizer class 'BertTokenizer', but has none of its files"):
        bridge.load(model).tokenizer()
    KINDS["chinese_wordpiece"](model)
    (model / "tokenizer_config.json").unlink()
    assert bridge.load(model).tokenizer().kind == "WordPiece"
