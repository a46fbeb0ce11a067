"""Packages whose names are imported on first use offer the same names as an eager import would."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest

PACKAGES = pytest.mark.parametrize("name", ["gpt2_jax", "gpt2_jax.data", "gpt2_jax.training"])


@PACKAGES
def test_the_imports_for_type_checkers_are_the_names_at_run_time(name: str) -> None:
    package = importlib.import_module(name)
    imported = {
        alias.name: statement.module
        for node in ast.parse(inspect.getsource(package)).body
        if isinstance(node, ast.If)
        for statement in node.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert sorted(imported) == sorted(package.__all__)
    for each, module in imported.items():
        assert module is not None
        assert getattr(package, each) is getattr(importlib.import_module(module), each)


@PACKAGES
def test_dir_lists_every_public_name(name: str) -> None:
    package = importlib.import_module(name)
    assert {*package.__all__} <= {*dir(package)}


def test_submodules_are_attributes_and_other_names_are_not() -> None:
    package = importlib.import_module("gpt2_jax")
    assert package.loss is importlib.import_module("gpt2_jax.loss")
    with pytest.raises(AttributeError, match="module 'gpt2_jax' has no attribute 'nothing'"):
        _ = package.nothing
    assert not hasattr(package, "__wrapped__")
