"""Mistakes in ports of other people's models, and whether a report names them.

    PYTHONPATH=.:tests python -m parity.pairs.mistakes

prints a table of how many are named rightly, wrongly, or not at all, and exits with 1 if any is named wrongly.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import torch
from flax import linen as nn
from parity.pairs import lstm, mlp, resnet, rotary_gpt

from gpt2_jax.parity import Report
from gpt2_jax.parity.pairs.compare import compare
from gpt2_jax.parity.pairs.padding import pad_tokens
from gpt2_jax.parity.pairs.sides.flax_module import linen_side
from gpt2_jax.parity.pairs.sides.jax_function import function_side
from gpt2_jax.parity.pairs.sides.side import Side
from gpt2_jax.parity.pairs.sides.torch_module import torch_side

FORWARD = ("names", "parameters", "outputs", "intermediates")
Pair = tuple[Side, Side, tuple[np.ndarray, ...]]


@dataclass(frozen=True)
class Mistake:
    model: str
    name: str
    make: Callable[[], Pair]
    check: str
    """The check that must fail first, in the order of `ORDER`."""
    place: str
    """What it must name."""
    says: str = ""
    """A part of what the report must say about it."""
    checks: tuple[str, ...] = FORWARD
    options: dict[str, Any] = field(default_factory=dict)


ORDER = ("names", "parameters", "determinism", "intermediates", "outputs", "state", "gradients", "padding")
"""What is wrong with the parameters explains the rest, and a random pass explains what follows."""


def report_of(mistake: Mistake) -> Report:
    left, right, inputs = mistake.make()
    return compare(left, right, inputs, checks=mistake.checks, dtypes=("float64", "float32"), **mistake.options)


def named(report: Report) -> tuple[str, str]:
    """The check that failed and the place that it names first."""
    failed = {check.name: check for check in report.checks if not check.passed}
    for name in ORDER:
        if (check := failed.get(name)) is not None:
            locations = [m.location for m in check.measurements if not m.passed]
            return name, re.split(r"[ ,]| at ", (check.first_divergence or locations[0]).rstrip(":"))[0].rstrip(":")
    return "", ""


def text_of(report: Report) -> str:
    parts = [f"{c.note} {c.first_divergence}" for c in report.checks]
    return " ".join([*parts, *report.diagnostics])


def verdict(mistake: Mistake, report: Report) -> str:
    """right, wrong, or unknown if nothing is named."""
    check, place = named(report)
    if not place:
        return "unknown"
    is_right = (check, place) == (mistake.check, mistake.place) and mistake.says in text_of(report)
    return "right" if is_right else "wrong"


# The rotary GPT.


def gpt(
    change: Callable[[dict[str, Any]], None] | None = None, params: dict[str, Any] | None = None, **choices: Any
) -> Callable[[], Pair]:
    """A port with other choices, or with `change` applied to its converted parameters."""

    def make() -> Pair:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = rotary_gpt.TorchGPT().eval()
        tree = {**rotary_gpt.converted(model), **(params or {})}
        if change is not None:
            change(tree)
        port = rotary_gpt.FlaxGPT(choices=rotary_gpt.Choices(**choices))
        rngs = {"dropout": jax.random.key(0)} if choices.get("dropout") else None
        return torch_side(model), linen_side(port, {"params": tree}, rngs=rngs), rotary_gpt.inputs_of()

    return make


def in_layer(module: str, leaf: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[dict[str, Any]], None]:
    def apply(tree: dict[str, Any]) -> None:
        node = tree["layers_0"]
        for part in module.split("."):
            node = node[part]
        node[leaf] = np.ascontiguousarray(change(node[leaf])).reshape(node[leaf].shape)

    return apply


def exchange_layers(tree: dict[str, Any]) -> None:
    tree["layers_0"], tree["layers_1"] = tree["layers_1"], tree["layers_0"]


def exchange_key_and_value(tree: dict[str, Any]) -> None:
    attn = tree["layers_0"]["attn"]
    attn["k_proj"], attn["v_proj"] = attn["v_proj"], attn["k_proj"]


def round_embedding(tree: dict[str, Any]) -> None:
    tree["embed"] = {"embedding": tree["embed"]["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)}


def interleave(kernel: np.ndarray) -> np.ndarray:
    D, H, K = kernel.shape
    return kernel.reshape(D, H, 2, K // 2).swapaxes(2, 3)


def in_bfloat16() -> Pair:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = nn.tanh(nn.Dense(8, name="fc0")(x))
            x = nn.tanh(nn.Dense(8, name="fc1", dtype=jnp.bfloat16)(x))
            return nn.Dense(3, name="fc2")(x)

    return mlp.torch_mlp_side(), linen_side(Net(), {"params": mlp.weights()}), mlp.inputs()


def half_precision_products() -> Pair:
    def call(params: Any, x: jax.Array) -> jax.Array:
        for k in range(3):
            kernel = params[f"fc{k}"]["kernel"]
            if x.dtype == jnp.float32:  # as GPUs and TPUs do by default
                x, kernel = (y.astype(jnp.bfloat16).astype(jnp.float32) for y in (x, kernel))
            x = x @ kernel + params[f"fc{k}"]["bias"]
            x = jnp.tanh(x) if k < 2 else x
        return x

    return mlp.torch_mlp_side(), function_side(call, mlp.weights()), mlp.inputs()


MIXED = "layers.0.attn.o_proj:input"
HEAD = {"head": {"kernel": np.random.default_rng(0).normal(size=(32, 40)).astype(np.float32)}}
Q = "layers.0.attn.q_proj.weight"
GPT = [
    Mistake("GPT", "rotation of neighbours for halves", gpt(interleaved=True), "intermediates", MIXED),
    Mistake("GPT", "rotary base 100000 for 10000", gpt(base=100_000.0), "intermediates", MIXED),
    Mistake("GPT", "positions of queries from 1", gpt(query_offset=1), "intermediates", MIXED),
    Mistake("GPT", "RMSNorm epsilon 1e-5 for 1e-6", gpt(eps=1e-5), "intermediates", "layers.0.input_norm"),
    Mistake("GPT", "norm weight without + 1", gpt(plus_one=False), "intermediates", "layers.0.input_norm"),
    Mistake("GPT", "mask one too wide", gpt(seen_ahead=1), "intermediates", MIXED),
    Mistake("GPT", "mask one too narrow", gpt(seen_ahead=-1), "intermediates", MIXED),
    Mistake("GPT", "scores not scaled", gpt(scale=1.0), "intermediates", MIXED),
    Mistake("GPT", "scores scaled by the width", gpt(scale=32**-0.5), "intermediates", MIXED),
    Mistake("GPT", "tanh GELU for erf", gpt(tanh_gelu=True), "intermediates", "layers.0.down_proj:input"),
    Mistake("GPT", "key heads repeated in turn", gpt(tile_heads=True), "intermediates", MIXED),
    Mistake("GPT", "residual after the norm", gpt(residual_of_norm=True), "intermediates", "layers.0.post_norm:input"),
    Mistake(
        "GPT",
        "norm in float32",
        gpt(float32_norm=True),
        "intermediates",
        "layers.0.input_norm",
        "size of float32 rounding",
    ),
    Mistake(
        "GPT", "tied head lost", gpt(params=HEAD, tied=False), "parameters", "head.weight", "is tied to embed.weight"
    ),
    Mistake(
        "GPT",
        "query projection not transposed",
        gpt(in_layer("attn.q_proj", "kernel", lambda w: w.reshape(32, 32).T)),
        "parameters",
        Q,
        "copied without its transpose",
    ),
    Mistake(
        "GPT",
        "heads permuted",
        gpt(in_layer("attn.q_proj", "kernel", lambda w: w[:, [0, 2, 1, 3]])),
        "parameters",
        Q,
        "blocks of 8 along axis 0 in the order 0, 2, 1, 3",
    ),
    Mistake(
        "GPT",
        "heads interleaved for another rotation",
        gpt(in_layer("attn.q_proj", "kernel", interleave)),
        "parameters",
        Q,
        "interleaved within blocks of 8: every 4th element is adjacent",
    ),
    Mistake(
        "GPT",
        "layers exchanged",
        gpt(exchange_layers),
        "parameters",
        "layers.0.input_norm.weight",
        "has the values of layers.1.input_norm.weight",
    ),
    Mistake(
        "GPT",
        "key and value exchanged",
        gpt(exchange_key_and_value),
        "parameters",
        "layers.0.attn.k_proj.weight",
        "has the values of layers.0.attn.v_proj.weight",
    ),
    Mistake(
        "GPT",
        "a bias lost",
        gpt(in_layer("up_proj", "bias", np.zeros_like)),
        "parameters",
        "layers.0.up_proj.bias",
        "the right side is 0 everywhere",
    ),
    Mistake("GPT", "weights rounded", gpt(round_embedding), "parameters", "embed.weight", "rounded to bfloat16"),
    Mistake(
        "GPT",
        "dropout left on",
        gpt(dropout=0.1),
        "determinism",
        "layers_0.Dropout_0",
        "flax is in training mode: layers_0.Dropout_0 (Dropout)",
        ("determinism",),
    ),
    Mistake(
        "GPT",
        "no gradient through the norm",
        gpt(constant_rms=True),
        "gradients",
        "layers.1.down_proj.bias",
        checks=(*FORWARD, "gradients"),
    ),
    Mistake(
        "GPT",
        "attention sees padding",
        gpt(sees_padding=True),
        "padding",
        "output",
        "output of flax, padded left",
        (*FORWARD, "padding"),
        {"pads": {"padded left": pad_tokens("left")}},
    ),
    Mistake("MLP", "a layer in bfloat16", in_bfloat16, "intermediates", "fc1", "flax computes fc1 in bfloat16"),
    Mistake("MLP", "products in half precision", half_precision_products, "outputs", "output"),
]


# The residual block.


USUAL, CUBE = resnet.Config(), resnet.Config(channels=3, width=3)


def block(
    change: Callable[[dict[str, Any]], None] | None = None,
    config: resnet.Config = USUAL,
    train: bool = False,
    left_train: bool | None = None,
    **choices: Any,
) -> Callable[[], Pair]:
    def make() -> Pair:
        module = resnet.torch_block(config).train(train if left_train is None else left_train)
        variables = resnet.converted(module)
        if change is not None:
            change(variables)
        port = resnet.FlaxBlock(config, resnet.Choices(train=train, **choices))
        return torch_side(module), linen_side(port, variables, images="NHWC"), resnet.inputs_of(config)

    return make


def lose_statistics(variables: dict[str, Any]) -> None:
    statistics = variables["batch_stats"]
    variables["batch_stats"] = {name: {"mean": np.zeros(4), "var": np.ones(4)} for name in statistics}


def keep_torch_order(variables: dict[str, Any]) -> None:
    kernel = variables["params"]["conv1"]["kernel"]
    variables["params"]["conv1"]["kernel"] = kernel.transpose(3, 2, 0, 1)


def flip(variables: dict[str, Any]) -> None:
    kernel = variables["params"]["conv1"]["kernel"]
    variables["params"]["conv1"]["kernel"] = kernel[::-1, ::-1]


def exchange_scale_and_bias(variables: dict[str, Any]) -> None:
    norm = variables["params"]["bn1"]
    norm["scale"], norm["bias"] = norm["bias"], norm["scale"]


STATE = (*FORWARD, "state")
RESNET = [
    Mistake("ResNet block", "BatchNorm epsilon 1e-3", block(eps=1e-3), "intermediates", "bn1"),
    Mistake("ResNet block", "padding SAME for 1", block(same_padding=True), "intermediates", "conv1"),
    Mistake("ResNet block", "ReLU before the sum", block(relu_before_sum=True), "intermediates", "fc:input"),
    Mistake("ResNet block", "stride in the second convolution", block(stride_in_second=True), "intermediates", "conv1"),
    Mistake("ResNet block", "leaky ReLU", block(leaky=0.01), "intermediates", "conv2:input"),
    Mistake(
        "ResNet block", "sum for mean", block(sum_for_mean=True), "intermediates", "fc:input", "is 9 times the left"
    ),
    Mistake(
        "ResNet block", "statistics lost", block(lose_statistics), "parameters", "bn1.running_mean", "is 0 everywhere"
    ),
    Mistake(
        "ResNet block",
        "kernel not permuted",
        block(keep_torch_order, CUBE),
        "parameters",
        "conv1.weight",
        "equal after a transpose by",
    ),
    Mistake("ResNet block", "kernel flipped", block(flip), "parameters", "conv1.weight", "reversed along axes 2, 3"),
    Mistake(
        "ResNet block",
        "scale and bias exchanged",
        block(exchange_scale_and_bias),
        "parameters",
        "bn1.weight",
        "has the values of bn1.bias",
    ),
    Mistake(
        "ResNet block",
        "momentum 0.1 for 0.9",
        block(train=True, momentum=0.1),
        "state",
        "bn1.running_mean",
        "moves 9 times as far",
        STATE,
    ),
    Mistake(
        "ResNet block",
        "biased variance",
        block(train=True),
        "state",
        "bn1.running_var",
        "the unbiased variance of 27 values",
        STATE,
    ),
    Mistake(
        "ResNet block",
        "training mode left on",
        block(left_train=True),
        "intermediates",
        "bn1",
        "torch is in training mode: bn1 (BatchNorm2d)",
    ),
]


# The LSTM cell.


def cell(change: Callable[[dict[str, np.ndarray]], Any] | None = None, **choices: Any) -> Callable[[], Pair]:
    def make() -> Pair:
        module = lstm.torch_cell()
        params = lstm.converted(module)
        if change is not None:
            change(params)
        return torch_side(module), function_side(lstm.cell(lstm.Choices(**choices)), params), lstm.inputs_of()

    return make


def other_gate_order(params: dict[str, np.ndarray]) -> None:
    for name, array in params.items():
        i, f, g, o = np.split(array, 4)
        params[name] = np.concatenate([i, g, f, o])


def exchange_biases(params: dict[str, np.ndarray]) -> None:
    params["bias_ih"], params["bias_hh"] = params["bias_hh"], params["bias_ih"]


def lose_bias(params: dict[str, np.ndarray]) -> None:
    del params["bias_hh"]


OUTPUTS = ("names", "parameters", "outputs")
H = "output[0]"
LSTM = [
    Mistake("LSTM cell", "gates in another order", cell(gates="igfo"), "outputs", H),
    Mistake(
        "LSTM cell",
        "gates of the weights in another order",
        cell(other_gate_order),
        "parameters",
        "cell.weight_ih",
        "in the order i, g, f, o",
    ),
    Mistake("LSTM cell", "forget bias 1", cell(forget_bias=1.0), "outputs", H),
    Mistake("LSTM cell", "one bias not added", cell(both_biases=False), "outputs", H),
    Mistake("LSTM cell", "one bias lost", cell(lose_bias, both_biases=False), "names", "cell.bias_hh"),
    Mistake("LSTM cell", "tanh and sigmoid exchanged", cell(exchanged_activations=True), "outputs", H),
    Mistake(
        "LSTM cell",
        "h and c exchanged",
        cell(exchanged_outputs=True),
        "outputs",
        H,
        "the left side equals output[1] of the right side",
    ),
    Mistake("LSTM cell", "no tanh of c", cell(no_output_tanh=True), "outputs", H),
    Mistake(
        "LSTM cell",
        "biases exchanged",
        cell(exchange_biases),
        "parameters",
        "cell.bias_ih",
        "has the values of cell.bias_hh",
    ),
]
LSTM = [replace(mistake, checks=OUTPUTS) for mistake in LSTM]

MISTAKES = [*GPT, *RESNET, *LSTM]


def main() -> int:
    counts: dict[str, Counter[str]] = {}
    for mistake in MISTAKES:
        report = report_of(mistake)
        found = verdict(mistake, report)
        counts.setdefault(mistake.model, Counter())[found] += 1
        if found != "right":
            print(f"{mistake.model}, {mistake.name}: {found}, {named(report)}: {text_of(report)}", flush=True)
    print("| model | mistakes | right | wrong | unknown |\n|---|---|---|---|---|")
    for model, found in counts.items():
        print(f"| {model} | {found.total()} | {found['right']} | {found['wrong']} | {found['unknown']} |")
    total: Counter[str] = sum(counts.values(), Counter())
    print(f"| all | {total.total()} | {total['right']} | {total['wrong']} | {total['unknown']} |")
    return int(total["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
