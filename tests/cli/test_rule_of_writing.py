"""Without permission no existing file changes; with it, only files of this project (`bridge.storage.atomic_writes`).

Each case compares the whole directory tree before and after. `tests/overwriting` does the same with random trees.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.commands import CONFIG, needs_torch, run
from support.models import SMALLEST, config_for, huggingface_directory, random_checkpoint
from support.tokenizers_for_tests import write_byte_tokenizer
from support.training_runs import RECIPE, data_for, write_text

import bridge
from bridge import CheckpointError
from bridge.formats import FORMATS, WRITABLE
from bridge.storage import manifest
from bridge.storage.tensors import LazyTensor, LazyTensorMap
from gpt2_jax.console.report_files import PLOT_FORMATS, require_plot_path, save_plot
from gpt2_jax.training.run import directory as runs

FILES = [to for to in WRITABLE if FORMATS[to].file_name is not None]


def contents(path: Path) -> dict[str, bytes | str | None]:
    """Return everything below `path`: bytes of files, targets of links, None for directories."""
    return {
        str(p.relative_to(path)): os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
        for p in sorted(path.rglob("*"))
    }


def source_for(to: str, path: Path) -> Path:
    return huggingface_directory(path, config_for(to, SMALLEST))


def saved(to: str, path: Path, seed: int = 3) -> Path:
    bridge.save(random_checkpoint(config_for(to, SMALLEST), seed=seed), path, format=to)
    return path


def refuses(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Assert that a command exits with 2, and return its message."""
    capsys.readouterr()
    assert run(*arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("gpt2: ") and "Traceback" not in printed
    return printed


# Directories with other files in them


def project(to: str, place: Path) -> Path:
    saved(to, place)
    (place / ".git").mkdir()
    (place / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (place / "train.py").write_text("import this")
    return place


def downloads(to: str, place: Path) -> Path:
    place.mkdir()
    saved("gguf", place / "small.gguf")
    (place / "thesis.pdf").write_bytes(b"%PDF years of work")
    return place


def folder_of_runs(to: str, place: Path) -> Path:
    for number in range(2):
        saved(to, place / f"run{number}")
    return place


def other_form(to: str, place: Path) -> Path:
    """The same model in a format whose names the target does not write."""
    return saved("flax" if to != "flax" else "huggingface", place)


def not_recognised(to: str, place: Path) -> Path:
    place.mkdir()
    (place / "config.json").write_text('{"port": 8080}')
    (place / "vocab.json").write_text('["cat", "dog"]')
    return place


def with_files_of_its_owner(to: str, place: Path) -> Path:
    """Files that belong to a checkpoint, but which the command does not write."""
    saved(to, place)
    for name in ("spiece.model", "vocab.txt", "meta.pkl", "chat_template.jinja"):
        (place / name).write_text("the only copy")
    (place / "generation_config.json").write_text('{"eos_token_id": 7}')
    return place


MAKERS = [project, downloads, folder_of_runs, other_form, not_recognised, with_files_of_its_owner]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("to", WRITABLE)
def test_a_directory_with_other_files_is_not_changed(
    tmp_path: Path, to: str, make: Callable[[str, Path], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = source_for(to, tmp_path / "source"), make(to, tmp_path / "target")
    before = contents(tmp_path)
    assert "exists; choose another name" in refuses(capsys, "convert", source, target, "--to", to)
    said = refuses(capsys, "convert", source, target, "--to", to, "--overwrite")
    assert "not overwritten, because it holds files that this command does not write" in said
    with pytest.raises(CheckpointError, match="not overwritten"):
        bridge.save(bridge.load(source), target, format=to, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", WRITABLE)
def test_a_replaced_checkpoint_leaves_no_old_file(tmp_path: Path, to: str, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = source_for(to, tmp_path / "source"), tmp_path / "target"
    options = {"max_shard_bytes": 2000} if to in ("huggingface", "flax_msgpack") else {}
    bridge.save(random_checkpoint(config_for(to, SMALLEST), seed=3), target, format=to, **options)
    shards = {name for name in contents(target) if "-of-" in name or name.endswith("index.json")}
    write_byte_tokenizer(target)
    before = contents(tmp_path)
    said = refuses(capsys, "convert", source, target, "--to", to, "--overwrite")
    assert "vocab.json" in said and "merges.txt" in said, "the source has no tokenizer to replace them"
    assert contents(tmp_path) == before
    write_byte_tokenizer(source)
    (source / "vocab.json").write_text((source / "vocab.json").read_text() + "\n")
    assert run("convert", source, target, "--to", to, "--overwrite", "--json", tmp_path / "report.json") == 0
    printed = capsys.readouterr().out
    assert {*json.loads((tmp_path / "report.json").read_text())["removed"]} == shards
    assert ("removed: " in printed) == bool(shards) and all(name in printed for name in shards)
    assert run("convert", source, tmp_path / "anew", "--to", to) == 0
    assert contents(target) == contents(tmp_path / "anew")


def test_files_in_the_manifest_of_an_export_are_removed_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = source_for("huggingface", tmp_path / "source"), saved("huggingface", tmp_path / "target")
    write_byte_tokenizer(target)
    (target / "additional_chat_templates").mkdir()
    (target / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    manifest.commit(target, {})
    assert run("convert", source, target, "--to", "huggingface", "--overwrite") == 0
    removed = "removed: additional_chat_templates/rag.jinja, manifest.json, merges.txt, vocab.json"
    assert removed in capsys.readouterr().out
    assert contents(target).keys() == {"config.json", "model.safetensors"}


def test_a_tokenizer_inside_the_source_replaces_files_of_the_same_names_only(tmp_path: Path) -> None:
    config = replace(config_for("gguf", SMALLEST), vocab_size=257)
    source = replace(random_checkpoint(config), own_tokenizer=bridge.byte_tokenizer)
    bridge.save(source, tmp_path / "m.gguf", format="gguf")
    bridge.save(random_checkpoint(config, seed=3), tmp_path / "out", format="huggingface")
    write_byte_tokenizer(tmp_path / "out")
    bridge.save(bridge.load(tmp_path / "m.gguf"), tmp_path / "out", format="huggingface", overwrite=True)
    assert bridge.load(tmp_path / "out").tokenizer().fingerprint == bridge.byte_tokenizer().fingerprint
    (tmp_path / "out" / "vocab.txt").write_text("of another tokenizer")
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match=r"not overwritten.*\n.*vocab\.txt"):
        bridge.save(bridge.load(tmp_path / "m.gguf"), tmp_path / "out", format="huggingface", overwrite=True)
    assert contents(tmp_path) == before


# Files


def archive(path: Path) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("word/document.xml", "<w:p>years of work</w:p>")
    path.write_bytes(content.getvalue())


@pytest.mark.parametrize("kind", ["zip", "text", "another model", "empty"])
@pytest.mark.parametrize("to", FILES)
def test_a_file_of_another_format_is_not_replaced(
    tmp_path: Path, to: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_for(to, tmp_path / "source")
    target = tmp_path / f"letter{FORMATS[to].suffixes[0]}"
    match kind:
        case "zip":
            archive(target)
        case "text":
            target.write_text("years of work")
        case "empty":
            target.touch()
        case _:
            other = "gguf" if to != "gguf" else "llmc"
            saved(other, tmp_path / f"x{FORMATS[other].suffixes[0]}").rename(target)
    before = contents(tmp_path)
    assert "exists; choose another name" in refuses(capsys, "convert", source, target, "--to", to)
    assert f"is not a {to} checkpoint and was not replaced" in refuses(
        capsys, "convert", source, target, "--to", to, "--overwrite"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("to", FILES)
def test_a_file_of_the_format_is_replaced_with_overwrite(tmp_path: Path, to: str) -> None:
    source, target = source_for(to, tmp_path / "source"), tmp_path / f"model{FORMATS[to].suffixes[0]}"
    saved(to, target)
    (tmp_path / "thesis.txt").write_text("beside it")
    assert run("convert", source, target, "--to", to, "--overwrite") == 0
    assert bridge.fingerprint(bridge.load(target).tensors) == bridge.fingerprint(bridge.load(source).tensors)
    assert (tmp_path / "thesis.txt").read_text() == "beside it"


@pytest.mark.parametrize("name", ["out.gguf", "out.pt", "out.PTH", "out.bin", "out.safetensors", "out.msgpack"])
@pytest.mark.parametrize("to", WRITABLE)
def test_a_target_with_the_suffix_of_another_format_is_refused(
    tmp_path: Path, to: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = source_for(to, tmp_path / "source"), tmp_path / name
    if target.suffix.lower() in FORMATS[to].suffixes:
        assert run("convert", source, target, "--to", to) == 0
        assert target.is_file()
        return
    before = contents(tmp_path)
    said = refuses(capsys, "convert", source, target, "--to", to)
    assert f"ends in {target.suffix.lower()}, but {to} is written as" in said
    assert contents(tmp_path) == before


# Changes during a conversion


def acting_at_tenth_tensor(checkpoint: bridge.Checkpoint, act: Callable[[], object]) -> bridge.Checkpoint:
    """A checkpoint that calls `act` when its tenth tensor is read."""
    calls: list[None] = []

    def watched(entry: LazyTensor) -> LazyTensor:
        def read() -> np.ndarray:
            calls.append(None)
            if len(calls) == 10:
                act()
            return entry.read()

        return replace(entry, read=read)

    entries = checkpoint.tensors.entries
    return replace(checkpoint, tensors=LazyTensorMap({name: watched(entry) for name, entry in entries.items()}))


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(("to", "as_file"), [*((to, False) for to in WRITABLE), *((to, True) for to in FILES)])
def test_a_target_created_during_the_write_is_not_replaced(
    tmp_path: Path, to: str, as_file: bool, overwrite: bool
) -> None:
    target = tmp_path / ("out" + (FORMATS[to].suffixes[0] if as_file else ""))

    def appear() -> None:
        if not as_file:
            target.mkdir()
        (target if as_file else target / "theirs").write_text("theirs")

    checkpoint = acting_at_tenth_tensor(random_checkpoint(config_for(to, SMALLEST)), appear)
    with pytest.raises(CheckpointError, match=r"exists|was created by|was changed by|not overwritten"):
        bridge.save(checkpoint, target, format=to, overwrite=overwrite)
    assert contents(tmp_path) == ({target.name: b"theirs"} if as_file else {"out": None, "out/theirs": b"theirs"})


def _save(source: str, target: str, seed: int, to: str, begin: object) -> None:
    begin.wait()  # type: ignore[attr-defined]
    with np.errstate(all="ignore"):
        try:
            bridge.save(bridge.load(f"{source}{seed}"), target, format=to)
        except CheckpointError:
            raise SystemExit(2) from None


@pytest.mark.processes
@pytest.mark.parametrize("name", ["out", "out.gguf"])
def test_two_processes_that_write_one_target_leave_one_whole_result(tmp_path: Path, name: str) -> None:
    context = multiprocessing.get_context("spawn")
    fingerprints = {}
    for seed in range(2):
        saved("huggingface", tmp_path / f"source{seed}", seed=seed)
        fingerprints[seed] = bridge.fingerprint(bridge.load(tmp_path / f"source{seed}").tensors)
    begin = context.Barrier(2)
    arguments = [(str(tmp_path / "source"), str(tmp_path / name), seed, "gguf", begin) for seed in range(2)]
    processes = [context.Process(target=_save, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert sorted(process.exitcode for process in processes) == [0, 2]  # type: ignore[type-var]
    winner = next(seed for seed, process in enumerate(processes) if process.exitcode == 0)
    assert bridge.fingerprint(bridge.load(tmp_path / name).tensors) == fingerprints[winner]
    assert {path.name for path in tmp_path.iterdir()} == {"source0", "source1", name}


# Targets that are not just a name


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", [".", "..", "/", "~", "source", "source/..", "parent of source", "its file", "link"])
def test_the_target_is_never_the_source_or_a_parent_of_it(
    tmp_path: Path, target: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    source = source_for("gguf", home / "models" / "source")
    saved("gguf", source / "model.gguf", seed=5)
    (source / "config.json").unlink()
    (source / "model.safetensors").unlink()
    (home / "link").symlink_to(source)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(source)
    named = {
        "~": home,
        "source": source,
        "source/..": source / "..",
        "parent of source": source.parent,
        "its file": source / "model.gguf",
        "link": home / "link",
    }.get(target, Path(target))
    flags = ["--overwrite"] if overwrite else []
    before = contents(tmp_path)
    said = refuses(capsys, "convert", source, named, "--to", "gguf", *flags)
    assert "is, or contains, the source checkpoint" in said
    assert contents(tmp_path) == before
    assert Path.cwd() == source


def test_a_checkpoint_in_memory_may_replace_its_source(tmp_path: Path) -> None:
    """A training loop of the user's own does this."""
    source = source_for("huggingface", tmp_path / "model")
    write_byte_tokenizer(source)
    loaded = bridge.load(source)
    trained = bridge.Checkpoint.of({name: 2 * x for name, x in loaded.tensors.items()}, loaded.config, like=loaded)
    bridge.save(trained, source, format="huggingface", overwrite=True)
    assert bridge.fingerprint(bridge.load(source).tensors) == bridge.fingerprint(trained.tensors)
    assert (source / "vocab.json").exists()


def test_the_empty_working_directory_is_a_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_for("flax", tmp_path / "source")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert run("convert", source, ".", "--to", "flax") == 0
    assert run("convert", source, ".", "--to", "flax", "--overwrite") == 0
    assert {path.name for path in Path().iterdir()} == {"config.json", "flax_model.safetensors"}


# --json, --plot and --cache


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = huggingface_directory(tmp_path / "model", CONFIG)
    write_byte_tokenizer(path)
    write_text(tmp_path)
    saved("gguf", tmp_path / "x.gguf")
    return path


VERBS_WITH_JSON = {
    "inspect": ("inspect", "{model}"),
    "inspect a file": ("inspect", "{tmp}/x.gguf"),
    "verify": ("verify", "{model}"),
    "diff": ("diff", "{model}", "{tmp}/x.gguf"),
    "generate": ("generate", "{model}", "We"),
    "eval": ("eval", "{model}", "--data", "{tmp}/text.txt"),
    "convert": ("convert", "{model}", "{tmp}/out", "--to", "flax"),
    "train": ("train", "--init-from", "{model}", "--data", "{tmp}/text.txt", "--out", "{tmp}/run"),
    "plan": ("plan", "--devices", "1"),
    "bench": ("bench",),
}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("name", ["x.gguf", "model/model.safetensors", "model/config.json", "text.txt", "model"])
@pytest.mark.parametrize("verb", [pytest.param(v, marks=needs_torch if v == "verify" else ()) for v in VERBS_WITH_JSON])
def test_json_replaces_only_reports(
    verb: str, name: str, flags: tuple[str, ...], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    arguments = [a.format(model=model, tmp=tmp_path) for a in VERBS_WITH_JSON[verb]]
    said = refuses(capsys, *arguments, "--json", tmp_path / name, *flags)
    assert any(w in said for w in ("exists; choose", "is not a report", "is read by this command", "cannot write"))
    assert contents(tmp_path) == before


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
@pytest.mark.parametrize("verb", [("bench",), ("plan", "--topology", "v5e:2x2", "--scaling")], ids=["bench", "plan"])
def test_plot_replaces_only_plots_of_this_command(
    verb: tuple[str, ...], flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.png").write_bytes(b"\x89PNG of somebody")
    (tmp_path / "slides.svg").write_text("<svg><text>slides about gpt2-bridge</text></svg>")
    (tmp_path / "slides.pdf").write_text("%PDF (gpt2-bridge)")
    shutil.copytree(bridge.BUNDLED, tmp_path / "model")
    before = contents(tmp_path)
    for name in ("photo.png", "slides.svg", "slides.pdf", "model/loss.png", "model/config.json"):
        if (tmp_path / name).exists():
            refuses(capsys, *verb, "--plot", tmp_path / name, *flags)
    assert contents(tmp_path) == before


def test_a_report_is_replaced_with_overwrite(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "report.json"
    assert run("inspect", model, "--json", report) == 0
    before = report.read_bytes()
    assert "replace an earlier report with --overwrite" in refuses(
        capsys, "inspect", tmp_path / "x.gguf", "--json", report
    )
    assert report.read_bytes() == before
    assert run("inspect", tmp_path / "x.gguf", "--json", report, "--overwrite") == 0
    assert report.read_bytes() != before


@pytest.mark.parametrize("suffix", PLOT_FORMATS)
def test_a_plot_is_replaced_with_overwrite(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"plot{suffix}"
    save_plot(Figure(), path)
    require_plot_path(path, overwrite=True)
    save_plot(Figure(figsize=(1, 1)), path, overwrite=True)
    with pytest.raises(bridge.BridgeError, match="both name"):
        require_plot_path(path, overwrite=True, json=tmp_path / "." / path.name)


@pytest.mark.parametrize("verb", ["inspect", "verify", "generate", "eval"])
def test_overwrite_without_a_report_is_an_error(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--overwrite: has no effect without --json" in refuses(capsys, verb, "--overwrite")


def test_a_report_is_not_written_to_a_pipe_or_a_broken_link(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "link.json").symlink_to(tmp_path / "nothing")
    before = {path.name for path in tmp_path.iterdir()}
    for name in ("pipe.json", "link.json"):
        refuses(capsys, "inspect", model, "--json", tmp_path / name, "--overwrite")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_report_that_appears_while_the_command_runs_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report, find = tmp_path / "report.json", bridge.find_diagnostics

    def late(checkpoint: bridge.Checkpoint) -> list[str]:
        report.write_text("theirs")
        return find(checkpoint)

    monkeypatch.setattr(bridge, "find_diagnostics", late)
    assert "exists; choose another name" in refuses(capsys, "inspect", model, "--json", report)
    assert report.read_text() == "theirs"


@pytest.mark.parametrize("name", ["model", "text.txt", "x.gguf", "data"])
def test_the_cache_must_be_a_directory_that_is_not_an_input(
    name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_text(tmp_path / "data")
    data = tmp_path / "data" if name == "data" else tmp_path / "text.txt"
    arguments = ("train", "--init-from", model, "--data", data, "--out", tmp_path / "run", "--cache", tmp_path / name)
    before = contents(tmp_path)
    assert "is a file, or an input of this command" in refuses(capsys, *arguments)
    assert contents(tmp_path) == before


# train and demo


@pytest.mark.parametrize("flags", [(), ("--resume",), ("--overwrite",)], ids=["", "resume", "overwrite"])
@pytest.mark.parametrize("kind", ["run.json of somebody", "foreign files", "a model", "a file"])
def test_train_does_not_change_a_directory_that_is_not_a_run(
    kind: str, flags: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    write_text(tmp_path)
    match kind:
        case "run.json of somebody":
            out.mkdir()
            (out / "run.json").write_text('{"distance_km": 10}')
            (out / "race.gpx").write_text("mine")
        case "foreign files":
            write_text(out)
        case "a model":
            saved("huggingface", out)
        case "a file":
            out.write_text("mine")
    before = contents(tmp_path)
    said = refuses(
        capsys,
        "train",
        "--data",
        tmp_path / "text.txt",
        "--out",
        out,
        "--cache",
        tmp_path / "cache",
        "--max-steps",
        1,
        *flags,
    )
    assert "out" in said
    after = {name: content for name, content in contents(tmp_path).items() if not name.startswith("cache")}
    assert after == before


def begun(path: Path) -> Path:
    runs.create(path, RECIPE, data_for(RECIPE, path.parent / "data"))
    return path


@needs_torch
def test_demo_keeps_a_run_with_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "demo").mkdir()
    run_directory = begun(tmp_path / "demo" / "run")
    (run_directory / "notes.txt").write_text("mine")
    before = contents(tmp_path / "demo")
    assert "exists" in refuses(capsys, "demo", "--out", tmp_path / "demo")
    said = refuses(capsys, "demo", "--out", tmp_path / "demo", "--overwrite")
    assert "holds files that training did not write" in said and "notes.txt" in said
    assert contents(tmp_path / "demo") == before


@pytest.fixture
def finished(tmp_path: Path) -> Iterator[Path]:
    yield begun(tmp_path / "run")


def test_an_export_with_other_files_is_kept(finished: Path) -> None:
    """The check happens before training, not at the export."""
    saved("huggingface", finished / "export")
    before = contents(finished)
    with pytest.raises(CheckpointError, match=r"export' is not overwritten.*\n  - 'config\.json'\n  - 'model\.safete"):
        runs.require_replaceable_export(finished)
    assert contents(finished) == before
