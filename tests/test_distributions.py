"""The contents, metadata and version of the source distribution and the wheel."""

from __future__ import annotations

import email
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

import bridge
import gpt2_jax
import gpt2_torch

ROOT = Path(__file__).parents[1]
PACKAGES = ("bridge", "gpt2_torch", "gpt2_jax")
BESIDE = ("MANIFEST.in", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff", "LICENSE")
SETUP = ("pyproject.toml", "constraints.txt", "Makefile", ".ci/run", ".ci/oldest.py")
NOT_SOURCE = (".git", ".venv*", ".tpu", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", "_build")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def build(source: Path, kind: str, target: Path) -> Path:
    """Build the `sdist` or `wheel` of `source`, as `pip` and `build` do, with this environment's setuptools."""
    command = [sys.executable, "-c", BUILD, kind, str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return target / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools writes beside the sources and would include files of an earlier build."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "copy", ignore=shutil.ignore_patterns(*NOT_SOURCE))
    archive = build(folder / "copy", "sdist", folder)
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from the source distribution, as `python -m build` does."""
    return zipfile.ZipFile(build(sdist, "wheel", tmp_path_factory.mktemp("wheel")))


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_source_distribution_has_the_packages_the_tests_and_the_setup(sdist: Path) -> None:
    found = files(sdist)
    for folder in (*PACKAGES, "tests"):
        expected = {f"{folder}/{name}" for name in files(ROOT / folder)}
        assert expected, folder
        assert expected <= found, sorted(expected - found)
    assert {*BESIDE, *SETUP} <= found


def test_the_wheel_has_only_the_packages(wheel: zipfile.ZipFile) -> None:
    found = {name for name in wheel.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")}
    assert found == {f"{package}/{name}" for package in PACKAGES for name in files(ROOT / package)}


def test_the_metadata_describes_the_project(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert (metadata["Name"], metadata["Version"]) == ("gpt2-bridge", bridge.__version__)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Author"] and metadata["Maintainer"]
    assert metadata["Description-Content-Type"] == "text/markdown"
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert b"gpt2 = gpt2_jax.cli:main" in wheel.read(entry_points)


def test_the_three_packages_and_the_citation_have_one_version() -> None:
    assert bridge.__version__ == gpt2_jax.__version__ == gpt2_torch.__version__
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited and cited[1] == bridge.__version__
