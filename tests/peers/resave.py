"""Load a checkpoint with transformers 4, compute its logits, and save it again. Runs in a separate environment.

python resave.py SOURCE IDS.npy LOGITS.npy TARGET [MAX_SHARD_SIZE]
"""

from __future__ import annotations

import sys

import numpy as np
from transformers import FlaxGPT2LMHeadModel


def main(source: str, ids: str, logits: str, target: str, max_shard_size: str = "10GB") -> None:
    model = FlaxGPT2LMHeadModel.from_pretrained(source)
    np.save(logits, np.asarray(model(np.load(ids)).logits))
    model.save_pretrained(target, max_shard_size=max_shard_size)


if __name__ == "__main__":
    main(*sys.argv[1:])
