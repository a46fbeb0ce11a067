"""What tests that run many small models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="module")
def torch_in_one_thread() -> Iterator[None]:
    """Several threads wait for each other longer than one computes: ten times as long where cores have other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
