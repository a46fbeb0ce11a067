"""The implementations that JAX is compared with, and their tasks."""

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
    """Another implementation."""

    packages: tuple[str, ...]
    """Packages that it needs."""
    tasks: tuple[Task, ...]
    compiled: bool = False
    """It uses `torch.compile`, so its first run takes a minute."""


PEERS: Mapping[str, Peer] = {
    "torch": Peer(("torch",), ("train", "forward", "decode", "load")),
    "torch-compiled": Peer(("torch",), ("train", "forward"), compiled=True),
    "transformers": Peer(("torch", "transformers"), ("train", "forward", "decode", "load")),
    "transformers-compiled": Peer(("torch", "transformers"), ("train", "forward", "decode"), compiled=True),
}


def missing_packages(name: str) -> list[str]:
    """The packages that this peer needs and that are not installed."""
    return [package for package in PEERS[name].packages if importlib.util.find_spec(package) is None]


def choose_peers(names: Sequence[str] | None) -> list[str]:
    """The peers with these names, or by default all installed peers that need no compilation.

    Raises:
        BridgeError: a name is unknown, or its packages are not installed.
    """
    if names is None:
        return [name for name, peer in PEERS.items() if not peer.compiled and not missing_packages(name)]
    chosen: list[str] = []
    for name in names:
        if name == ALL:
            chosen += [peer for peer in PEERS if not missing_packages(peer)]
        elif name not in PEERS:
            raise BridgeError(f"--peers {name}: must be one of {', '.join(PEERS)}, {ALL}")
        elif packages := missing_packages(name):
            raise BridgeError(
                f"--peers {name}: {' and '.join(packages)} is not installed; pip install it, or choose other peers"
            )
        else:
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def own_implementation(task: Task) -> str:
    """The implementation of this project, which the peers are compared with."""
    return "convert" if task == "convert" else "jax"


def peers_with(task: Task, peers: Sequence[str]) -> list[str]:
    """The peers that have this task. The only peer of `convert` is `cp`."""
    return ["cp"] if task == "convert" else [name for name in peers if task in PEERS[name].tasks]
