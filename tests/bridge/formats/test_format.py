"""The table of formats: every row has the interface that `bridge.formats.format` documents."""

from __future__ import annotations

import inspect
import re

import pytest

from bridge.formats import FORMATS, WRITABLE
from bridge.formats.format import Format


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_reader_has_the_options_that_its_format_needs(format: Format) -> None:
    _, *options = inspect.signature(format.read).parameters
    needs = {
        "config_json": format.file_name is not None,
        "activation": not format.states_activation,
        "base": format.base_name is not None,
        "drop_extra_heads": format.may_have_extra_heads,
    }
    assert options == [name for name, needed in needs.items() if needed]


@pytest.mark.parametrize("name", WRITABLE)
def test_a_single_file_has_a_suffix_and_a_directory_has_a_pattern(name: str) -> None:
    format = FORMATS[name]
    is_file = format.file_name is not None
    assert (is_file, not is_file) == (bool(format.suffixes), bool(format.weight_files))
    if format.file_name is not None:
        assert format.file_name.endswith(format.suffixes)
        assert re.fullmatch(format.written_names, format.file_name)
