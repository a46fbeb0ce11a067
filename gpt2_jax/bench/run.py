"""Run benchmark cases and collect their results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from gpt2_jax.bench.cases import Case
from gpt2_jax.bench.measure import DeviceRates, Say, compare
from gpt2_jax.bench.peers import own_implementation, peers_with
from gpt2_jax.bench.report import Report, Result, system_load
from gpt2_jax.training.config import TrainConfig


def run(config: TrainConfig, cases: Sequence[Case], peers: Sequence[str], rounds: int, say: Say) -> Report:
    """Compare JAX with every peer in every case. A case without peers measures JAX alone."""
    results = []
    load = system_load()
    with ExitStack() as stack:
        rates = DeviceRates(stack, config.dtype)
        for case in cases:
            own, others = own_implementation(case.task), peers_with(case.task, peers)
            groups = [[own, other] for other in others] or [[own]]
            comparisons = [compare(case, group, rounds, rates, say) for group in groups]
            unsupported = [] if case.task == "convert" else [name for name in peers if name not in others]
            results.append(Result(case, comparisons, unsupported))
    return Report(config, results, rates.sources, rates.failure, load)
