"""Random writers on random trees of checkpoints, runs, reports and foreign files: no foreign file changes.

    PYTHONPATH=.:tests python -m overwriting.driver --cases 10000 [--seed 1]

Each case builds a tree of files whose owners are known. One verb, or one function of the Python API, then writes into
it, with or without permission to overwrite. Afterwards every earlier file must be unchanged, unless the rule of writing
allows it to change. After a refusal, the whole tree must be unchanged. The rule is restated here with literal names,
independent of the code under test.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure
from support.models import SMALLEST, config_for, random_checkpoint
from support.training_runs import RECIPE, data_for, run_in

import bridge
from bridge import BridgeError
from bridge.formats import FORMATS, WRITABLE
from gpt2_jax.cli import main as gpt2
from gpt2_jax.console.report_files import require_html_path, require_plot_path, save_plot, write_html_report
from gpt2_jax.reporting.markup import HTML_START
from gpt2_jax.training import loop
from gpt2_jax.training.run import directory as runs

COMPANIONS = {
    *("config.json", "generation_config.json", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("spiece.model", "chat_template.jinja"),
}
TOKENIZER = COMPANIONS - {"config.json", "generation_config.json"}
WEIGHTS = {
    "huggingface": r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json",
    "flax": r"flax_model\.safetensors",
    "flax_msgpack": r"flax_model(-\d{5}-of-\d{5})?\.msgpack|flax_model\.msgpack\.index\.json",
    "nanogpt": r"ckpt\.pt",
    "llmc": r"model\.bin",
    "gguf": r"model\.gguf",
}
PAGE = f'{HTML_START}{bridge.__version__}">'
FOREIGN = {
    "thesis.txt": b"years of work",
    "config.json": b'{"port": 8080}',
    "vocab.json": b'["cat", "dog"]',
    "spiece.model": b"somebody's tokenizer",
    "chat_template.jinja": b"somebody's template",
    "generation_config.json": b'{"eos_token_id": 7}',
    "run.json": b'{"distance_km": 10}',
    "manifest.json": b'{"files": ["thesis.txt"]}',
    "report.json": b'{"profit": 3}',
    "loss.png": b"\x89PNG of somebody",
    "page.html": b"<!doctype html>\n<title>gpt2-bridge</title>",
    "letter.docx": b"PK\x03\x04 not a checkpoint",
    "other.pt": b"PK\x03\x04archive/data.pkl",
    "model.gguf": b"GGUF\x03\x00\x00\x00",
    "model.bin": b"\0" * 64,
    "model.safetensors.bak": b"a backup",
    ".git/config": b"[core]",
    "notes/today.md": b"- write",
    ".fresh.0123abcd.partial/new": b"mine, whatever it is called",
    ".place0.0123abcd.partial/old": b"mine, whatever it is called",
    ".place1.0123abcd.partial/leaving/x": b"mine, whatever it is called",
}


@dataclass
class Tree:
    """A directory under test, and the owner of each of its files."""

    root: Path
    owners: dict[Path, str] = field(default_factory=dict)
    """File -> "checkpoint", "tokenizer", "run", "begun", "recorded" (by a manifest), "report" or "foreign"."""
    homes: dict[Path, Path] = field(default_factory=dict)
    """File -> the directory of the copied template that it belongs to."""
    places: list[Path] = field(default_factory=list)
    """Directories and files that may become the target of a writer."""
    kinds: dict[Path, str] = field(default_factory=dict)
    """Place -> the template of which it is a copy."""

    def add(self, template: Path, to: Path, owner: str) -> None:
        if template.is_dir():
            shutil.copytree(template, to, dirs_exist_ok=True, symlinks=True)
            for file in (path for path in template.rglob("*") if path.is_file()):
                name = file.relative_to(template)
                recorded = owner == "run" and name.parts[0] in ("export", "checkpoints")
                self.owners[to / name] = "recorded" if recorded else owner
                self.homes[to / name] = to
        else:
            shutil.copyfile(template, to)
            self.owners[to] = owner
            self.homes[to] = to.parent
        self.places.append(to)

    def add_foreign(self, name: str, directory: Path) -> None:
        path = directory / name
        if name in COMPANIONS and (directory / "run.json").exists():
            return  # a run does not record its tokenizer files: they are known by name
        if not os.path.lexists(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(FOREIGN[name])
            self.owners[path] = "foreign"
            if path.parent == directory:
                self.places.append(path)

    def contents(self) -> dict[Path, bytes | None]:
        """Return path -> content of every file, the target of a link, or None for a directory."""
        found: dict[Path, bytes | None] = {}
        for path in self.root.rglob("*"):
            if path.is_symlink():
                found[path] = os.fsencode(os.readlink(path))
            else:
                found[path] = path.read_bytes() if path.is_file() else None
        return found

    def below(self, directory: Path, home: Path | None = None) -> dict[Path, str]:
        """Return the files below a directory and their owners. Files that do not belong to `home` are foreign.

        home: by default, the directory itself.
        """
        return {
            path: owner if self.homes.get(path) == (home or directory) else "foreign"
            for path, owner in self.owners.items()
            if directory in path.parents
        }


@dataclass(frozen=True)
class Writing:
    """One write: a description, the action, and the existing files that it may change."""

    what: str
    act: Callable[[], int]
    """Returns the exit code."""
    may_change: Callable[[Path], bool]
    target: Path
    """New files may appear only here."""


def templates(home: Path) -> dict[str, Path]:
    """Create one template of each kind."""
    made = {}
    for to in WRITABLE:
        checkpoint = random_checkpoint(config_for(to, SMALLEST), seed=1)
        bridge.save(checkpoint, home / to, format=to)
        made[to] = home / to
        if (file_name := FORMATS[to].file_name) is not None:
            made[f"{to} file"] = home / file_name
            bridge.save(checkpoint, made[f"{to} file"], format=to)
    bridge.save_tokenizer(bridge.byte_tokenizer(), home / "tokenizer")
    run_in(home, RECIPE, "run")
    runs.create(home / "begun", RECIPE, data_for(RECIPE, home))
    silently(lambda: gpt2(["inspect", str(home / "flax"), "--json", str(home / "inspected.json")]))
    save_plot(Figure(), home / "drawn.png")
    write_html_report(home / "page.html", PAGE)
    return (
        made
        | {"home": home}
        | {name: home / name for name in ("tokenizer", "run", "begun", "inspected.json", "drawn.png", "page.html")}
    )


REPORTS = ("inspected.json", "drawn.png", "page.html")
OWNERS = {"run": "run", "begun": "begun", "tokenizer": "tokenizer"} | dict.fromkeys(REPORTS, "report")


def build(root: Path, made: dict[str, Path], rng: random.Random) -> Tree:
    tree = Tree(root)
    for number in range(rng.randrange(1, 4)):
        kind = rng.choice([*sorted(made.keys() - {"home"}), "empty", "foreign"])
        inside = [place for place in tree.places if place.is_dir() and not place.is_symlink()]
        parent = rng.choice(inside) if inside and rng.random() < 0.15 else root
        to = parent / rng.choice([f"place{number}", f"place {number}[x]"])
        if kind in ("empty", "foreign"):
            to.mkdir()
            tree.places.append(to)
        else:
            tree.add(made[kind], to.with_suffix(made[kind].suffix), OWNERS.get(kind, "checkpoint"))
            tree.kinds[tree.places[-1]] = kind
        if kind == "foreign" or rng.random() < 0.25:
            for name in rng.sample([*FOREIGN], rng.randrange(1, 4)):
                tree.add_foreign(name, tree.places[-1] if tree.places[-1].is_dir() else root)
        if rng.random() < 0.15:
            link = root / f"link{number}"
            link.symlink_to(rng.choice([tree.places[-1], root / "nowhere", root]))
            tree.places.append(link)
    return tree


@dataclass(frozen=True)
class Chosen:
    """The tree, the templates and the target of a writer."""

    tree: Tree
    made: dict[str, Path]
    rng: random.Random
    target: Path
    overwrite: bool

    @property
    def real(self) -> Path:
        return self.target.resolve()

    @property
    def flags(self) -> list[str]:
        return ["--overwrite"] if self.overwrite else []

    @property
    def template(self) -> str:
        return self.tree.kinds.get(self.target, "")

    def source(self, default: str) -> Path:
        return self.rng.choice([self.made[default], *(place for place in self.tree.places if place.exists())])


def choose(tree: Tree, made: dict[str, Path], rng: random.Random) -> Writing:
    """Choose a writer and its target, which usually exists."""
    here = rng.choice([*tree.places, tree.root])
    target = here if rng.random() < 0.8 else here.parent / "fresh" if here.is_file() else here / "fresh"
    chosen = Chosen(tree, made, rng, target, overwrite=rng.random() < 0.6)
    suited = {"run": [end, remove], "begun": [begin, remove], "tokenizer": [tokenizer]}.get(chosen.template, [])
    suited += [report, plot, page] if OWNERS.get(chosen.template) == "report" else []
    every = [save, save, convert, convert, report, plot, page, tokenizer, begin, end, remove]
    return rng.choice(suited if suited and rng.random() < 0.6 else every)(chosen)


def save(c: Chosen) -> Writing:
    target, to, source, allowed = _conversion(c)

    def act() -> int:
        bridge.save(bridge.load(source), target, format=to, overwrite=c.overwrite)
        return 0

    return Writing(f"save {source} as {to} to {target}, overwrite={c.overwrite}", act, allowed, target.resolve())


def convert(c: Chosen) -> Writing:
    target, to, source, allowed = _conversion(c)
    arguments = ("convert", source, target, "--to", to, *c.flags)
    return Writing(f"gpt2 {arguments}", lambda: run(*arguments), allowed, target.resolve())


def _conversion(c: Chosen) -> tuple[Path, str, Path, Callable[[Path], bool]]:
    target, to = c.target, c.rng.choice(WRITABLE)
    if c.template.partition(" ")[0] in WRITABLE and c.rng.random() < 0.6:
        to = c.template.partition(" ")[0]
    elif c.rng.random() < 0.2:
        target = target.with_suffix(c.rng.choice([".gguf", ".pt", ".bin", ".safetensors"]))
    real, source = target.resolve(), c.source(to)
    is_apart = real not in (source.resolve(), *source.resolve().parents)
    beside = source if source.is_dir() else source.parent
    written = COMPANIONS & {"config.json", *(os.listdir(beside) if beside.is_dir() else ())}
    return target, to, source, lambda path: c.overwrite and is_apart and _replaced_by(c.tree, real, to, written, path)


def report(c: Chosen) -> Writing:
    file = _report_file(c)
    arguments = ("inspect", c.source("flax"), "--json", file, *c.flags)
    return Writing(f"gpt2 {arguments}", lambda: run(*arguments), _replaces_report(c, file), file.resolve())


def plot(c: Chosen) -> Writing:
    file = _report_file(c)

    def act() -> int:
        require_plot_path(file, overwrite=c.overwrite)
        save_plot(Figure(), file, overwrite=c.overwrite)
        return 0

    return Writing(f"plot to {file}, overwrite={c.overwrite}", act, _replaces_report(c, file), file.resolve())


def page(c: Chosen) -> Writing:
    file = _report_file(c)

    def act() -> int:
        require_html_path(file, overwrite=c.overwrite)
        write_html_report(file, PAGE, overwrite=c.overwrite)
        return 0

    return Writing(f"page to {file}, overwrite={c.overwrite}", act, _replaces_report(c, file), file.resolve())


def _report_file(c: Chosen) -> Path:
    return (
        c.target
        if c.rng.random() < 0.5
        else c.target / c.rng.choice(["report.json", "config.json", "loss.png", "page.html"])
    )


def _replaces_report(c: Chosen, file: Path) -> Callable[[Path], bool]:
    real = file.resolve()
    return lambda path: c.overwrite and path == real and c.tree.owners.get(path) == "report"


def tokenizer(c: Chosen) -> Writing:
    real = c.real

    def act() -> int:
        bridge.save_tokenizer(bridge.byte_tokenizer(), c.target, overwrite=c.overwrite)
        return 0

    def may_change(path: Path) -> bool:
        owners = {c.tree.owners.get(real / name) for name in TOKENIZER if (real / name).exists()}
        return c.overwrite and path.parent == real and path.name in TOKENIZER and owners == {"tokenizer"}

    return Writing(f"tokenizer to {c.target}, overwrite={c.overwrite}", act, may_change, real)


def begin(c: Chosen) -> Writing:
    real, resume = c.real, c.overwrite

    def act() -> int:
        runs.create(c.target, RECIPE, data_for(RECIPE, c.made["home"]), resume=resume)
        return 0

    def may_change(path: Path) -> bool:
        is_begun = c.tree.owners.get(real / "run.json") == "begun"
        return resume and is_begun and path.parent == real and path.name in {"run.json", "config.json", *TOKENIZER}

    return Writing(f"begin a run in {c.target}, resume={resume}", act, may_change, real)


def end(c: Chosen) -> Writing:
    real = c.real

    def act() -> int:
        runs.require_run(c.target)
        runs.require_replaceable_export(c.target)
        loop.finish(c.target, {}, 6, None)
        return 0

    def may_change(path: Path) -> bool:
        export = real / "export"
        is_own = all(owner == "recorded" for owner in c.tree.below(export, home=real).values())
        is_run = c.tree.owners.get(real / "run.json") == "run"
        return is_run and is_own and (export in path.parents or path == real / "loss.png")

    return Writing(f"end the run {c.target}", act, may_change, real)


def remove(c: Chosen) -> Writing:
    real = c.real

    def act() -> int:
        runs.remove(c.target)
        return 0

    def may_change(path: Path) -> bool:
        is_run = c.tree.owners.get(real / "run.json") in ("run", "begun")
        is_own = all(owner in ("run", "recorded", "begun") for owner in c.tree.below(real).values())
        return is_run and is_own and real in path.parents

    return Writing(f"remove the run {c.target}", act, may_change, real)


def _replaced_by(tree: Tree, target: Path, to: str, written: set[str], path: Path) -> bool:
    """Return whether a checkpoint of format `to` at `target` may replace `path`.

    written: the companions that are written with it.
    """
    if path == target:
        return tree.owners.get(path) == "checkpoint" and path.suffix in FORMATS[to].suffixes
    if target not in path.parents:
        return False
    names = re.compile("|".join([WEIGHTS[to], *map(re.escape, written)]))
    below = tree.below(target)
    recorded = any(owner == "recorded" for owner in below.values())
    return all(
        owner == "recorded"
        or (
            file.parent == target
            and names.fullmatch(file.name)
            and (owner == "checkpoint" or (recorded and owner != "foreign"))
        )
        for file, owner in below.items()
    )


def run(*arguments: object) -> int:
    try:
        gpt2([str(argument) for argument in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    raise AssertionError("the command did not exit")


def silently(act: Callable[[], object]) -> tuple[int, str]:
    """Return exit code and output. A `BridgeError` of the Python API counts as exit code 2."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = act()
        except BridgeError as error:
            code, _ = 2, print(error)
        except SystemExit as ended:
            code = ended.code
    return int(code or 0), printed.getvalue()  # type: ignore[call-overload]


def check(number: int, seed: int, made: dict[str, Path], scratch: Path) -> str:
    """Run one case. Returns "refused", "written" or "overwritten". A failure raises `AssertionError` with its seed."""
    rng = random.Random(f"{seed} {number}")
    root = scratch / "tree"
    root.mkdir()
    tree = build(root, made, rng)
    writing = choose(tree, made, rng)
    before = tree.contents()
    with contextlib.chdir(rng.choice([root, *(place for place in tree.places if place.is_dir())])):
        code, printed = silently(writing.act)
        case = f"case {number} of seed {seed}: {writing.what}: exit {code}: {printed}"
        assert os.path.exists("."), f"{case}: the working directory is missing"
    after = tree.contents()
    assert code in (0, 2), case
    assert "Traceback" not in printed, case
    if code == 2:
        changed = {path for path in {*before, *after} if before.get(path, b"gone") != after.get(path, b"gone")}
        assert not changed, f"{case}: refused, but changed {changed}"
    for path, content in before.items():
        if after.get(path, b"gone") != content and content is not None:
            assert writing.may_change(path), f"{case}: {path} changed"
    for path in after.keys() - before.keys():
        is_target = writing.target in (path, *path.parents) or path in writing.target.parents
        assert is_target, f"{case}: {path} appeared"
    shutil.rmtree(root)
    overwritten = any(after.get(path, b"gone") != content for path, content in before.items())
    return "refused" if code else "overwritten" if overwritten else "written"


def cases(count: int, seed: int, made: dict[str, Path], scratch: Path) -> Iterator[str]:
    """Yield the result of each case. `made`: the templates, which are also sources and must not change."""
    original = {path: path.read_bytes() for path in made["home"].rglob("*") if path.is_file()}
    for number in range(count):
        yield check(number, seed, made, scratch)
    for path, content in original.items():
        assert path.read_bytes() == content, f"a source changed: {path}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    chosen = parser.parse_args()
    began = time.perf_counter()
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(prefix="overwriting-", dir=place) as scratch:
        home = Path(scratch) / "home"
        home.mkdir()
        counts = Counter(cases(chosen.cases, chosen.seed, templates(home), Path(scratch)))
    print(f"{dict(counts)}; no foreign file changed; {time.perf_counter() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
