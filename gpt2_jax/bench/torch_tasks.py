"""Benchmark tasks in PyTorch: `gpt2_torch` and the GPT-2 of transformers, both eager and with `torch.compile`.

On GPUs, float32 products may use TF32, as they do in XLA. bfloat16 means autocast with float32 weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

import bridge
from bridge import GPT2Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MAX_GRAD_NORM = 1.0

Action = Callable[[], Any]


def import_packages(name: str) -> None:
    if name.startswith("transformers"):
        from transformers import GPT2LMHeadModel  # noqa: F401
    else:
        import gpt2_torch  # noqa: F401


def prepare(job: dict[str, Any]) -> tuple[Action, Action]:
    if DEVICE == "cuda":
        torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    action = {"train": _train, "forward": _forward, "decode": _decode, "load": _load}[job["task"]](job)
    return action, lambda: None


def device_info() -> dict[str, Any]:
    if DEVICE == "cpu":
        return {"device": "CPU", "device_peak_bytes": None}
    return {"device": torch.cuda.get_device_name(), "device_peak_bytes": torch.cuda.max_memory_allocated()}


def _train(job: dict[str, Any]) -> Action:
    model, logits_of = _model(job)
    ids = torch.from_numpy(job["ids"]).to(DEVICE)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].flatten()

    def loss_of(inputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        with _autocast(job):
            return F.cross_entropy(logits_of(inputs).flatten(0, 1).float(), labels)

    run = torch.compile(loss_of) if _compiles(job) else loss_of
    optimizer, parameters = _adamw(model.train(), GPT2Config(**job["model"])), list(model.parameters())

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = run(inputs, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()  # on a GPU, this waits for the entire step, because operations run in order

    return step


def _forward(job: dict[str, Any]) -> Action:
    model, logits_of = _model(job)
    model.eval()
    inputs = torch.from_numpy(job["ids"])[:, :-1].contiguous().to(DEVICE)

    def forward(inputs: torch.Tensor) -> torch.Tensor:
        with _autocast(job):
            return logits_of(inputs)

    run = torch.compile(forward) if _compiles(job) else forward

    @torch.no_grad()
    def action() -> None:
        run(inputs)
        _synchronize()

    return action


def _decode(job: dict[str, Any]) -> Action:
    dtype = getattr(torch, job["dtype"])
    model = _model(job)[0].to(dtype).eval()
    prompts = job["ids"][:, :-1].tolist()
    if job["name"] == "torch":
        import gpt2_torch

        decoder, generation = gpt2_torch.Decoder(model), bridge.GenerationConfig(job["new_tokens"])
        return lambda: decoder.generate(prompts, generation)
    if not _compiles(job):
        return lambda: generate_with_transformers(model, prompts, job["new_tokens"])
    model.forward = torch.compile(model.forward)  # the static cache has the same shape for every token
    return lambda: generate_with_transformers(model, prompts, job["new_tokens"], cache_implementation="static")


def _load(job: dict[str, Any]) -> Action:
    if job["name"] == "torch":
        import gpt2_torch

        return lambda: gpt2_torch.GPT2.from_pretrained(job["directory"]).to(DEVICE)
    import transformers

    model_class: Any = transformers.GPT2LMHeadModel
    return lambda: model_class.from_pretrained(job["directory"]).to(DEVICE)


@torch.no_grad()
def generate_with_transformers(model: Any, prompts: Sequence[Sequence[int]], new_tokens: int, **kwargs: Any) -> None:
    """Generate exactly `new_tokens` tokens greedily with transformers. All prompts must have the same length."""
    ids = torch.tensor(prompts, device=model.device)
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
        **kwargs,
    )
    _synchronize()


def _model(job: dict[str, Any]) -> tuple[Any, Callable[[torch.Tensor], torch.Tensor]]:
    """A model with random float32 weights, and a function from token ids to its logits."""
    config = GPT2Config(**job["model"])
    if job["name"].startswith("transformers"):
        import transformers

        hf = transformers.GPT2Config(**replace(config, bias=True).to_hf())
        peer: Any = transformers.GPT2LMHeadModel(hf)
        peer.to(DEVICE)
        return peer, lambda ids: peer(ids, use_cache=False).logits
    import gpt2_torch

    model = gpt2_torch.GPT2(config).to(DEVICE)
    return model, model


def _adamw(model: torch.nn.Module, config: GPT2Config) -> torch.optim.AdamW:
    """Fused AdamW, PyTorch's fastest, with weight decay on the same parameters as in JAX."""
    names = {p.torch_name for p in bridge.parameters(config) if p.decays}
    decaying: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (decaying if name.removeprefix("transformer.") in names else others).append(parameter)
    groups = [{"params": decaying, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)


def _autocast(job: dict[str, Any]) -> AbstractContextManager[Any]:
    return torch.autocast(DEVICE, torch.bfloat16, enabled=job["dtype"] == "bfloat16")


def _compiles(job: dict[str, Any]) -> bool:
    return job["name"].endswith("-compiled")


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
