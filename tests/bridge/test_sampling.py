"""What may be asked of `generate`."""

from __future__ import annotations

import math

import pytest
from models import TINY

from bridge import BridgeError
from bridge.sampling import LARGEST_SEED, check_request

GOOD = {"prompt_length": 3, "max_new_tokens": 4, "temperature": 0.8, "top_k": 5, "seed": 1}


def test_sensible_requests_pass() -> None:
    check_request(TINY, **GOOD)
    check_request(TINY, 1, 0, 0.0, None, 0)
    check_request(TINY, 1, TINY.n_positions - 1, 100.0, 10**6, LARGEST_SEED)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"prompt_length": 0}, "prompt is empty"),
        ({"max_new_tokens": -2}, "max_new_tokens=-2"),
        ({"max_new_tokens": TINY.n_positions}, "n_positions=40"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": 0}, "top_k=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": LARGEST_SEED + 1}, "seed=4294967296"),
    ],
)
def test_others_are_refused_by_name(wrong: dict[str, float], says: str) -> None:
    with pytest.raises(BridgeError, match=says):
        check_request(TINY, **{**GOOD, **wrong})  # type: ignore[arg-type]
