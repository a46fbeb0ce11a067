"""Who is compared, and in what."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from bridge import BridgeError

Task = Literal["train", "forward", "decode", "load", "convert"]
TASKS: tuple[Task, ...] = get_args(Task)

ALL = "all"


@dataclass(frozen=True)
class Peer:
    """What an implementation needs to be installed, and what it can do."""

    packages: tuple[str, ...]
    tasks: tuple[Task, ...]
    compiled: bool = False


PEERS: Mapping[str, Peer] = {
    "torch": Peer(("torch",), ("train", "forward", "decode", "load")),
    "torch-compiled": Peer(("torch",), ("train", "forward"), compiled=True),
    "transformers": Peer(("torch", "transformers"), ("train", "forward", "decode", "load")),
    "transformers-compiled": Peer(("torch", "transformers"), ("train", "forward", "decode"), compiled=True),
}


def missing(name: str) -> list[str]:
    """The packages that it needs and that are not installed."""
    return [package for package in PEERS[name].packages if importlib.util.find_spec(package) is None]


def chosen_peers(names: Sequence[str] | None) -> list[str]:
    """The peers that were asked for; unless any were, those installed that need no compiling.

    Raises `BridgeError` for a name that is none, and for one that is not installed.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if not peer.compiled and not missing(name)]
    chosen: list[str] = []
    for name in names:
        if name == ALL:
            chosen += [peer for peer in PEERS if not missing(peer)]
        elif name not in PEERS:
            raise BridgeError(f"--peers {name}: must be one of {', '.join(PEERS)}, {ALL}")
        elif packages := missing(name):
            raise BridgeError(f"--peers {name}: {' and '.join(packages)} is not installed; pip install it, or leave it")
        else:
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def ours(task: Task) -> str:
    """What the peers are compared with."""
    return "convert" if task == "convert" else "jax"


def rivals(task: Task, peers: Sequence[str]) -> list[str]:
    """Those of the peers that have this task; a conversion has only `cp` beside it."""
    return ["cp"] if task == "convert" else [name for name in peers if task in PEERS[name].tasks]
