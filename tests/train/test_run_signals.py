"""A signal ends a run before its last step, and nothing is lost."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from training_runs import RECIPE, run_in, stop_at

import bridge
from bridge.formats.run import steps
from gpt2_jax.train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("quick_compilation")


def test_a_signal_ends_a_run_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGTERM here; `gpt2 train` is sent both in tests/cli."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (5, signal.SIGTERM)
    assert steps(outcome.run)[-1] == 5
    assert outcome.to_json()["stopped_by"] == "SIGTERM"
    assert bridge.load(outcome.export).config.n_layer == 2
    assert [record["step"] for record in read_metrics(outcome.run)] == [0, 2, 4]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_in_the_last_step_ends_nothing_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(monkeypatch, 6, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (6, None)


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in a shell's background it is ignored

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # which ends the process
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, RECIPE)
    assert steps(tmp_path / "run") == [3]
