"""Process-wide settings of the command."""

from __future__ import annotations

import logging
import os
import stat
import sys
import threading
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from support.commands import run

from gpt2_jax.cli.verbs import VERBS, load_verb
from gpt2_jax.console import process
from gpt2_jax.console.process import (
    HUGE_PAGES,
    TUNABLES,
    enable_compilation_cache,
    restart_with_huge_pages,
    suppress_duplicate_tracebacks,
    with_huge_pages,
)


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux system that offers huge pages on request. Returns the file that states it."""
    file = tmp_path / "enabled"
    file.write_text("always [madvise] never\n")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(process, "_TRANSPARENT_HUGE_PAGES", file)
    return file


def test_huge_pages_are_added_to_the_users_tunables(linux: Path) -> None:
    assert with_huge_pages({"A": "1"}) == {"A": "1", TUNABLES: HUGE_PAGES}
    assert with_huge_pages({TUNABLES: "glibc.malloc.check=3"})[TUNABLES] == f"glibc.malloc.check=3:{HUGE_PAGES}"


def test_huge_pages_are_not_requested_if_configured_or_unavailable(
    linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = {TUNABLES: "glibc.malloc.hugetlb=0"}
    assert with_huge_pages(off) == off
    linux.write_text("always madvise [never]\n")
    assert with_huge_pages({}) == {}
    linux.unlink()
    assert with_huge_pages({}) == {}
    monkeypatch.setattr(sys, "platform", "darwin")
    assert with_huge_pages({}) == {}


def test_the_command_restarts_once_with_the_same_arguments(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    monkeypatch.setattr(os, "environ", {"A": "1"})
    monkeypatch.setattr(sys, "orig_argv", ["python", "-X", "utf8", "gpt2", "train"])
    monkeypatch.setattr(sys, "stdout", None)  # as with >&-
    restart_with_huge_pages()
    ((program, arguments, environment),) = started
    assert program == arguments[0] == sys.executable and arguments[1:] == ["-X", "utf8", "gpt2", "train"]
    assert environment["A"] == "1" and environment[TUNABLES] == HUGE_PAGES
    without_tunables = {name: value for name, value in environment.items() if name != TUNABLES}
    monkeypatch.setattr(os, "environ", without_tunables)
    restart_with_huge_pages()
    assert len(started) == 1


def test_a_command_that_cannot_restart_continues(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(os, "execve", fails)
    monkeypatch.setattr(os, "environ", {})
    restart_with_huge_pages()


@pytest.fixture
def cache_setting() -> Any:
    before = jax.config.values["jax_compilation_cache_dir"]
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("cpu", "kept"), [("vendor_id : AuthenticAMD", True), ("vendor_id : GenuineIntel", False), ("arm64", True)]
)
def test_programs_are_cached_by_cpu_features(
    cpu: str, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: cpu)
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    folder = jax.config.values["jax_compilation_cache_dir"]
    assert (folder is not None) == kept
    if kept:
        assert Path(folder).is_dir() and Path(folder).is_relative_to(tmp_path)
        monkeypatch.setattr(process, "_cpu", lambda: cpu + " sse9")
        jax.config.update("jax_compilation_cache_dir", None)
        enable_compilation_cache()
        assert jax.config.values["jax_compilation_cache_dir"] != folder


@pytest.fixture
def some_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None) -> Path:
    """The cache directory on a CPU whose programs are cached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: "some")
    jax.config.update("jax_compilation_cache_dir", None)
    return tmp_path / "gpt2-bridge"


def test_the_cache_of_programs_is_private(some_cpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0)
    try:
        enable_compilation_cache()
    finally:
        os.umask(before)
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    assert [stat.S_IMODE(path.stat().st_mode) for path in (some_cpu, folder.parent, folder)] == [0o700] * 3
    assert folder.parent.parent == some_cpu and capsys.readouterr().err == ""


@pytest.mark.parametrize("level", [0, 1, 2], ids=["cache", "compiled", "folder"])
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_cache_that_others_may_write_to_is_not_used(
    level: int, mode: int, some_cpu: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enable_compilation_cache()
    folder = Path(jax.config.values["jax_compilation_cache_dir"])
    jax.config.update("jax_compilation_cache_dir", None)
    opened = (some_cpu, folder.parent, folder)[level]
    opened.chmod(mode)
    enable_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gpt2: ") and f"other users can write to '{opened}'" in line and "chmod go-w" in line
    opened.chmod(0o755)
    enable_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(folder)


def test_a_cache_of_another_user_is_not_used(
    some_cpu: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    some_cpu.mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: some_cpu.stat().st_uid + 1)
    enable_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    assert f"'{some_cpu}' belongs to another user; set XDG_CACHE_HOME" in capsys.readouterr().err


def test_cpu_programs_of_several_processes_are_not_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache_setting: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(process, "_cpu", lambda: "vendor_id : AuthenticAMD")
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache(several_processes=True)
    assert jax.config.values["jax_compilation_cache_dir"] is None


def test_a_configured_cache_directory_is_kept(tmp_path: Path, cache_setting: None) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    enable_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)


def test_without_a_home_directory_nothing_is_cached(monkeypatch: pytest.MonkeyPatch, cache_setting: None) -> None:
    def fails() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(process, "cache_directory", fails)
    monkeypatch.setattr(process, "_cpu", lambda: "some")
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--attention", "cudnn"], "attention=cudnn: takes bfloat16 and float16, not float32"),
        (["--attention", "cudnn", "--dtype", "bfloat16"], "attention='cudnn' needs an NVIDIA GPU"),
        (["--attention", "splash"], "attention='splash' needs a TPU"),
        (["--attention", "splash", "--seq-len", "100"], "takes lengths that are multiples of 128, not 100"),
        (["--attention", "blockwise", "--attn-pdrop", "0.1"], "attn_pdrop"),
        (["--attention", "blockwise", "--examples", "documents"], "--examples documents"),
        (
            ["--attention", "cudnn", "--dtype", "bfloat16", "--examples", "packed"],
            "attention=cudnn: does not support segment_ids, which packed documents have",
        ),
    ],
)
def test_unavailable_attention_is_refused_before_the_run_is_created(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be. " * 200)
    out = tmp_path / "run"
    code = run("train", "--preset", "nano", "--data", text, "--tokenizer", "bytes", "--out", out, *flags)
    assert code == 2 and said in capsys.readouterr().err and not out.exists()


@pytest.mark.parametrize(
    ("file", "error", "is_printed"),
    [
        ("site-packages/orbax/checkpoint/_src/futures/future.py", OSError("no space"), False),
        ("site-packages/orbax/checkpoint/_src/futures/future.py", None, True),
        ("site-packages/absl/app.py", OSError("no space"), True),
    ],
)
def test_tracebacks_of_orbax_threads_are_suppressed(file: str, error: OSError | None, is_printed: bool) -> None:
    suppress_duplicate_tracebacks()
    said = error and (type(error), error, None)
    record = logging.LogRecord("absl", logging.ERROR, file, 1, "it raised an exception", (), said)
    assert bool(logging.getLogger("absl").filter(record)) == is_printed


@pytest.mark.parametrize(("error", "is_printed"), [("Event loop is closed", False), ("another", True)])
def test_errors_about_a_closed_event_loop_are_suppressed(
    error: str, is_printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(process, "_previous_unraisablehook", said.append)
    monkeypatch.setattr(sys, "unraisablehook", None)
    suppress_duplicate_tracebacks()
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(error)))  # type: ignore[arg-type]
    assert bool(said) == is_printed


@pytest.mark.parametrize(("module", "is_printed"), [("tensorboard.summary.writer", False), ("threading", True)])
def test_tracebacks_of_tensorboard_threads_are_suppressed(
    module: str, is_printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setattr(process, "_previous_excepthook", said.append)
    monkeypatch.setattr(threading, "excepthook", None)
    suppress_duplicate_tracebacks()
    thread = type("Writer", (threading.Thread,), {"__module__": module})()
    threading.excepthook(SimpleNamespace(exc_value=OSError("no space"), thread=thread))  # type: ignore[arg-type]
    assert bool(said) == is_printed


@pytest.mark.parametrize(
    ("name", "settings"),
    [("inspect", []), ("bench", []), ("generate", ["cache"]), ("eval", ["cache"]), ("demo", ["huge pages", "cache"])],
)
def test_the_process_is_set_up_before_a_verb_runs(
    name: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    verb = VERBS[name]
    monkeypatch.setattr(process, "restart_with_huge_pages", lambda: calls.append("huge pages"))
    monkeypatch.setattr(process, "enable_compilation_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(import_module(f"gpt2_jax.cli.verbs.{verb.module}"), verb.function, lambda: calls.append("verb"))
    load_verb(name, (), own_process=True)()
    assert calls == [*settings, "verb"]
    calls.clear()
    load_verb(name, ())()  # `main(args)` in a process of the caller's
    assert calls == ["verb"]
