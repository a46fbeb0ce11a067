"""How often top-p keeps other tokens than transformers, which cuts inside ties.

    python -m tests.benchmarks.top_p_ties [--top-p 0.9] [--tokens 4096]

The logits are the bundled model's on its validation text, in float32 and in bfloat16. For each it prints in how many
positions the two sets differ, how many tokens more are kept there, and their probability.
"""

from __future__ import annotations

import argparse

import torch
import transformers

import bridge
import gpt2_torch
from gpt2_torch.sampling import keep_top_p


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    checkpoint = bridge.load("bundled")
    text = (bridge.BUNDLED / "validation.txt").read_text(encoding="utf-8")
    T = checkpoint.config.n_positions
    ids = torch.tensor(checkpoint.tokenizer().encode_ordinary(text)[: options.tokens // T * T]).reshape(-1, T)
    for dtype in (torch.float32, torch.bfloat16):
        model = gpt2_torch.model_from_checkpoint(checkpoint).to(dtype)
        with torch.no_grad():
            logits = torch.cat([model(row[None])[0] for row in ids]).float()
        theirs = transformers.TopPLogitsWarper(options.top_p)(None, logits) > -torch.inf  # type: ignore[arg-type]
        ours = keep_top_p(logits, options.top_p) > -torch.inf
        more, differs = ours & ~theirs, (ours != theirs).any(-1)
        print(
            f"{dtype}: {len(logits)} positions, {ours.sum(-1).float().mean():.1f} tokens kept; {differs.sum()} "
            f"positions differ ({differs.float().mean():.2%}), {(theirs & ~ours).sum()} tokens missing"
        )
        if differs.any():
            extra = (logits.softmax(-1) * more).sum(-1)[differs]
            print(
                f"  where they differ: {more.sum(-1)[differs].float().mean():.2f} tokens more (at most "
                f"{more.sum(-1).max()}), with a total probability of {extra.mean():.4f} (at most {extra.max():.4f})"
            )


if __name__ == "__main__":
    main()
