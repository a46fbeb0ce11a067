"""A reimplementation of nanoGPT's model and optimizer, which writes and loads its checkpoints with torch.

Source: https://github.com/karpathy/nanoGPT, which is not a package. Names, layouts and groups are those of model.py,
and the keys of a checkpoint are those of train.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NanoGPT(nn.Module):
    """Map ids [B, T] to logits [B, T, V]."""

    def __init__(
        self, n_layer: int, n_head: int, n_embd: int, block_size: int, bias: bool, vocab_size: int, dropout: float
    ) -> None:
        super().__init__()
        layers = nn.ModuleList(Layer(n_embd, n_head, bias) for _ in range(n_layer))
        parts = {
            "wte": nn.Embedding(vocab_size, n_embd),
            "wpe": nn.Embedding(block_size, n_embd),
            "drop": nn.Dropout(dropout),
            "h": layers,
            "ln_f": nn.LayerNorm(n_embd, bias=bias),
        }
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        parts = self.transformer
        x = parts.drop(parts.wte(ids) + parts.wpe(torch.arange(ids.shape[1])))
        for layer in parts.h:
            x = layer(x)
        return self.lm_head(parts.ln_f(x))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        linear: Callable[[int, int], nn.Module] = lambda i, o: nn.Linear(i, o, bias=bias)  # noqa: E731
        # The order matters: the optimizer numbers parameters in the order of their creation.
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = nn.ModuleDict({"c_attn": linear(width, 3 * width), "c_proj": linear(width, width)})
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.mlp = nn.ModuleDict({"c_fc": linear(width, 4 * width), "c_proj": linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn.c_attn(self.ln_1(x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.attn.c_proj(mixed)
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


def random_model(**model_args: Any) -> NanoGPT:
    """Return a model with random parameters. Biases of zero and LayerNorm scales of one would hide permuted rows."""
    torch.manual_seed(0)
    model = NanoGPT(**model_args)
    for name, parameter in model.named_parameters():
        center = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
        nn.init.normal_(parameter, mean=center, std=0.2)
    return model


def adamw(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with two groups, by the number of axes, each in the order of `named_parameters()`."""
    parameters = list(model.parameters())
    return grouped([p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2])


def adamw_before_june_2023(model: nn.Module) -> torch.optim.AdamW:
    """Return AdamW with two groups, by the kind of module, each sorted by name. Embeddings do not decay."""
    parameters = dict(sorted(model.named_parameters()))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    decaying = {name: p for name, p in parameters.items() if name in linear}
    return grouped([*decaying.values()], [p for name, p in parameters.items() if name not in decaying])


def grouped(decaying: list[nn.Parameter], others: list[nn.Parameter]) -> torch.optim.AdamW:
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=2e-3, betas=(0.9, 0.99), eps=1e-8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    """Update the model on ids [B, T + 1]."""
    logits = model(ids[:, :-1])
    optimizer.zero_grad()
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    optimizer.step()


def checkpoint(model: nn.Module, optimizer: torch.optim.Optimizer | None, model_args: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint like that of train.py."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict() if optimizer else None,
        "model_args": model_args,
        "iter_num": 3,
        "best_val_loss": torch.tensor(2.5),
        "config": {"dataset": "shakespeare_char", "learning_rate": 2e-3, "compile": True, "batch_size": 12},
    }


def resumed(path: Path) -> tuple[NanoGPT, torch.optim.AdamW]:
    """Resume from a checkpoint as train.py does, in the dtype of the weights."""
    saved = torch.load(path, weights_only=True)
    model = NanoGPT(**saved["model_args"]).to(saved["model"]["lm_head.weight"].dtype)
    model.load_state_dict({name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()})
    optimizer = adamw(model)
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer
