"""A signal ends a run early without loss of work."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from support.training_runs import RECIPE, all_weights, recipe, records, run_in, stop_at

import bridge
from bridge.formats.trainers.run import steps, validation_loss, verified
from bridge.storage.locks import exclusive_lock
from gpt2_jax.training import Outcome, loop, preemption
from gpt2_jax.training.preemption import Preempted, PreemptionHandler
from gpt2_jax.training.run.checkpointing import Checkpoints
from gpt2_jax.training.run.directory import LOCK
from gpt2_jax.training.run.metrics import read_metrics

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]


@pytest.fixture(autouse=True)
def default_sigint_handler() -> Iterator[None]:
    """Install Python's own handler, because a shell starts background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_ends_a_run_after_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This sends SIGTERM; tests/cli sends both signals to `gpt2 train`."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    stop_at(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGTERM))
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (5, signal.SIGTERM)
    assert steps(outcome.run)[-1] == 5
    assert outcome.to_json()["stopped_by"] == "SIGTERM"
    assert bridge.load(outcome.export).config.n_layer == 2
    assert [record["step"] for record in read_metrics(outcome.run)] == [0, 2, 4]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


def test_a_signal_after_the_last_step_has_no_effect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = Checkpoints.save

    def signal_in_the_last(self: Checkpoints, state: Any, loss: float | None) -> None:
        save(self, state, loss)
        if int(state.step) == 6:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Checkpoints, "save", signal_in_the_last)
    outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (6, None)


def test_no_more_than_one_step_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal is handled after the steps that are already queued, and a step may take a minute."""
    awaited: list[int] = []
    make = loop.make_train_step

    class Loss(float):
        step: int

        def block_until_ready(self) -> None:
            awaited.append(self.step)

    def make_watched(*args: Any, **options: Any) -> Any:
        train_step = make(*args, **options)

        def step(state: Any, batch: Any) -> Any:
            begun = int(state.step) + 1
            assert awaited == [*range(1, begun - 1)]
            state, metrics = train_step(state, batch)
            loss = Loss(metrics["loss"])
            loss.step = begun
            return state, {**metrics, "loss": loss}

        return Compiled(step, train_step.lower)

    monkeypatch.setattr(loop, "make_train_step", make_watched)
    outcome = run_in(tmp_path, recipe(log_every=6, eval_every=6, checkpoint_every=6))
    assert (outcome.step, awaited) == (6, [1, 2, 3, 4, 5])


@pytest.mark.parametrize("step", [0, 4, 6])
def test_an_interrupted_evaluation_is_repeated_by_a_resume(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Outcome
) -> None:
    """Before the first step, in the middle, and after the last step: a run is complete only after its evaluation."""
    with monkeypatch.context() as stopping:
        signal_in_evaluation(stopping, step)
        outcome = run_in(tmp_path, RECIPE)
    assert (outcome.step, outcome.stopped_by) == (step, signal.SIGTERM)
    assert steps(outcome.run)[-1] == step
    assert validation_loss(outcome.run, step) is None
    assert all("val_loss" not in record for record in read_metrics(outcome.run) if record["step"] == step)
    resumed = run_in(tmp_path, RECIPE, resume=True)
    assert (resumed.step, resumed.stopped_by, resumed.best_step) == (6, None, finished.best_step)
    assert records(resumed.run) == records(finished.run)
    for name, array in all_weights(finished.export).items():
        np.testing.assert_allclose(all_weights(resumed.export)[name], array, atol=1e-6)
    if step:
        assert verified(resumed.run, step)["val_loss"] == validation_loss(finished.run, step)


def signal_in_evaluation(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Between the two batches of the evaluation after `step`."""
    inner, seen = loop.validation_loss, []

    def signalled(*args: Any) -> float:
        *rest, state, mesh, check = args

        def check_after_one() -> None:
            seen.append(int(state.step))
            if seen.count(step) == 2:
                signal.raise_signal(signal.SIGTERM)
            check()

        return inner(*rest, state, mesh, check_after_one)

    monkeypatch.setattr(loop, "validation_loss", signalled)


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("which", ["make_train_step", "make_eval_step"])
def test_compilation_is_interrupted_at_once(
    which: str, start: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Outcome
) -> None:
    """The compilation here never ends. The run is resumed from where it was."""
    if start:
        shutil.copytree(finished.run.parent, tmp_path, dirs_exist_ok=True)
        for step in steps(tmp_path / "run"):
            if step > start:
                shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step))
    released, make = threading.Event(), getattr(loop, which)

    def make_slow(*args: Any, **options: Any) -> Any:
        function = make(*args, **options)

        def take_for_ever() -> None:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)  # type: ignore[arg-type]
            assert released.wait(300)

        return Compiled(function, lambda *arguments: SimpleNamespace(compile=take_for_ever))

    with monkeypatch.context() as slow:
        slow.setattr(loop, which, make_slow)
        outcome = run_in(tmp_path, RECIPE, resume=True)
    released.set()
    # The run resumes from an evaluated checkpoint, so that the evaluation step is compiled at step 6.
    stopped_at = 6 if start and which == "make_eval_step" else start
    assert (outcome.step, outcome.stopped_by, steps(outcome.run)[-1]) == (stopped_at, signal.SIGTERM, stopped_at)
    resumed = run_in(tmp_path, RECIPE, resume=True)
    assert (resumed.step, resumed.stopped_by) == (6, None)
    assert records(resumed.run) == records(finished.run)


class Compiled:
    """A compiled function with another `lower`."""

    def __init__(self, function: Callable[..., Any], lower: Callable[..., Any]) -> None:
        self._function, self.lower = function, lower

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


def test_an_error_of_the_compiler_is_raised_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise MemoryError("too large")

    make = loop.make_train_step
    lowered = SimpleNamespace(compile=fail)
    monkeypatch.setattr(loop, "make_train_step", lambda *a, **o: Compiled(make(*a, **o), lambda *arguments: lowered))
    with pytest.raises(MemoryError, match="too large"):
        run_in(tmp_path, RECIPE)


def test_a_step_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step uses the program that the thread has compiled."""
    made: list[Any] = []
    make = loop.make_train_step
    monkeypatch.setattr(loop, "make_train_step", lambda *a, **o: made.append(make(*a, **o)) or made[-1])
    compiled: list[str] = []

    def count(event: str, duration: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration" and about.get("fun_name") == "jit(step)":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        run_in(tmp_path, RECIPE)
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert len(compiled) == 1


def test_a_second_signal_acts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # which ends the process
        signal.raise_signal(signal.SIGINT)

    stop_at(monkeypatch, 4, twice)
    with pytest.raises(KeyboardInterrupt):
        run_in(tmp_path, RECIPE)
    assert steps(tmp_path / "run") == [3]


def test_two_signals_within_one_call_end_the_process(tmp_path: Path) -> None:
    """Python runs no handler before the call returns, and then only one for both signals."""
    code = """
import signal, jax
from gpt2_jax.training.preemption import PreemptionHandler
once = lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: x * 1.5 % 1.0, x)
long = jax.jit(lambda x: jax.lax.fori_loop(0, 1000, lambda i, x: once(x), x)).lower(1.0).compile()
with PreemptionHandler(second=signal.SIG_DFL):
    print("in", flush=True)
    float(long(1.0))
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "in\n"
        time.sleep(0.5)
        for _ in range(2):
            assert child.poll() is None
            child.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        try:
            assert child.wait(60) == 128 + signal.SIGTERM
        finally:
            child.kill()


def test_the_run_is_locked_until_the_export_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, locked = loop.finish, []

    def finish(run: Path, *arguments: Any) -> Outcome:
        with exclusive_lock(run / LOCK) as free:
            locked.append(not free)
        return inner(run, *arguments)

    monkeypatch.setattr(loop, "finish", finish)
    run = run_in(tmp_path, RECIPE).run
    assert locked == [True]
    with exclusive_lock(run / LOCK) as free:
        assert free


@pytest.fixture
def received_by_jax(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Simulate several processes. The list has the signals that JAX's handler of SIGTERM receives."""
    numbers: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: numbers.append(number))
    monkeypatch.setattr(preemption, "are_several", lambda: True)
    monkeypatch.setattr(preemption.multihost_utils, "reached_preemption_sync_point", lambda question: question == 3)
    yield numbers
    signal.signal(signal.SIGTERM, before)


def agree(stop: PreemptionHandler) -> None:
    stop.check()
    stop.check()
    with pytest.raises(Preempted):
        stop.check()


def test_a_late_signal_to_one_of_several_processes_does_not_interrupt_saving(received_by_jax: list[int]) -> None:
    """The system signals every process, and they agree to stop before the last one is signalled."""
    with PreemptionHandler() as stop:
        agree(stop)
        signal.raise_signal(signal.SIGTERM)
        assert (received_by_jax, stop.received) == ([], signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # the next signal ends the process
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_ctrl_c_in_one_of_several_processes_stops_the_others(received_by_jax: list[int]) -> None:
    with PreemptionHandler() as stop:
        signal.raise_signal(signal.SIGINT)
        assert (received_by_jax, stop.received) == ([signal.SIGTERM], None)
        agree(stop)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_late_ctrl_c_in_one_of_several_processes_is_ignored(received_by_jax: list[int]) -> None:
    with PreemptionHandler() as stop:
        agree(stop)
        signal.raise_signal(signal.SIGINT)
        assert received_by_jax == []
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
