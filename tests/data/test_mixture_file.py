"""Files that describe mixtures: what they hold, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2_jax.data import DataError, RecordOptions
from gpt2_jax.data.file_kinds import is_mixture_file
from gpt2_jax.data.mixture_file import MixtureSource, read_mixture


def mixture(directory: Path, text: str) -> Path:
    path = directory / "mixture.toml"
    path.write_text(text)
    return path


def test_the_sources_of_a_file(tmp_path: Path) -> None:
    path = mixture(
        tmp_path,
        """
        [books]
        path = "books/*.txt"
        weight = 3
        [chats]
        path = "/data/chats.jsonl"
        weight = 0.5
        messages_field = "turns"
        ["python-3.x"]
        path = "stdlib"
        weight = 1.0
        """,
    )
    assert is_mixture_file(path)
    options = RecordOptions(skip_bad=True, max_tokens=9)
    assert read_mixture(path, options) == (
        MixtureSource("books", str(tmp_path / "books/*.txt"), 3.0, options),
        MixtureSource("chats", "/data/chats.jsonl", 0.5, RecordOptions(None, None, None, "turns", True, 9)),
        MixtureSource("python-3.x", "stdlib", 1.0, options),
    )


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "has 0 tables; give one for each source, at most 256"),
        ("x = [", "is not a TOML file: Invalid value"),
        ("[a]\nweight = 1", r"\[a\] has no path"),
        ("[a]\npath = 3\nweight = 1", r"\[a\] has no path"),
        ("[a]\npath = 'x'", r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = 0", r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = 1e-320", r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = nan", r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = true", r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = 1" + "0" * 400, r"\[a\]: weight must be a number above 0"),
        ("[a]\npath = 'x'\nweight = 1\nlr = 2", r"\[a\] has the key 'lr'; the keys of a source are path, weight"),
        ("[a]\npath = 'x'\nweight = 1\ntext_field = 2", r"\[a\]: text_field must be a string"),
        ("[a]\npath = 'mixture.toml'\nweight = 1", r"\[a\]: 'mixture.toml' is a mixture itself"),
        ("a = 1", r"\[a\] is not a table with path and weight"),
        ("['a/b']\npath = 'x'\nweight = 1", r"\[a/b\]: names of sources have letters, digits"),
        ("[a.b]\npath = 'x'\nweight = 1", r"\[a\] has the key 'b'"),
        ("\n".join(f"[a{i}]\npath = 'x'\nweight = 1" for i in range(257)), "has 257 tables"),
        ("a = " + "[" * 5000, "is not a TOML file"),
        ("a = 1" + "0" * 5000, "is not a TOML file"),
    ],
)
def test_what_is_no_mixture_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        read_mixture(mixture(tmp_path, text), RecordOptions())


def test_fields_are_named_for_each_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a mixture; name the fields of each source in it"):
        read_mixture(mixture(tmp_path, "[a]\npath = 'x'\nweight = 1"), RecordOptions(text_field="body"))
