"""One of two processes that shard the model with FSDP2.

    python fsdp.py RANK DIRECTORY

Writes the largest difference of a gradient to that of the whole batch in one process.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch
from support.models import TINY, random_checkpoint, random_ids
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gpt2_torch import GPT2, model_from_checkpoint, next_token_loss

PROCESSES = 2


def main(rank: int, directory: Path) -> None:
    init = f"file://{directory / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=PROCESSES)
    whole = model_from_checkpoint(random_checkpoint(replace(TINY, n_layer=2))).double()
    ids = torch.from_numpy(random_ids(whole.config, batch=2 * PROCESSES))
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for layer in sharded.h:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    next_token_loss(whole(ids), ids).backward()
    own = ids.chunk(PROCESSES)[rank]
    next_token_loss(sharded(own), own).backward()
    (directory / f"difference-{rank}").write_text(str(largest_difference(sharded, whole)))
    distributed.destroy_process_group()


def largest_difference(sharded: GPT2, whole: GPT2) -> float:
    found = 0.0
    for (name, shard), expected in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(shard.grad, DTensor), name
        assert shard.to_local().numel() < expected.numel(), name
        found = max(found, float((shard.grad.full_tensor() - expected.grad).abs().max()))
    return found


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
