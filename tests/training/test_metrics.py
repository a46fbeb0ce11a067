"""Logs of a run: JSON lines, TensorBoard, Weights & Biases and the plot; and the FLOPs of a step."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from support.refusals import within_budget
from support.training_runs import RECIPE, data_for, files, recipe, write_text

from bridge import GPT2_SIZES, GPT2Config
from gpt2_jax import hardware
from gpt2_jax.cli.run_training import run_training
from gpt2_jax.hardware import flops_per_token, peak_flops
from gpt2_jax.training import TrainConfig, TrainingError, resolve_config, train
from gpt2_jax.training.run.metrics import Metrics, plot_losses, read_metrics


def write(run: Path, config: TrainConfig, start: int, *records: tuple[int, dict[str, float | None]]) -> None:
    metrics = Metrics(run, config, start)
    for step, values in records:
        metrics.write(step, values)
    metrics.close()


def test_a_record_omits_missing_values(tmp_path: Path) -> None:
    write(tmp_path, RECIPE, 0, (0, {"val_loss": 5.5}), (2, {"train_loss": 5.0, "mfu": None}))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 0, "val_loss": 5.5}, {"step": 2, "train_loss": 5.0}]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, RECIPE, 0)
    metrics.write(1, {"train_loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "train_loss": 1.0}]
    metrics.close()


def test_what_was_logged_after_the_checkpoint_is_dropped_on_resume(tmp_path: Path) -> None:
    write(tmp_path, RECIPE, 0, *((step, {"train_loss": float(step)}) for step in (0, 2, 4, 6)))
    write(tmp_path, RECIPE, 4, (6, {"train_loss": 60.0}))
    assert [(r["step"], r["train_loss"]) for r in read_metrics(tmp_path)] == [(0, 0.0), (2, 2.0), (4, 4.0), (6, 60.0)]


@pytest.mark.parametrize("cut", ['{"step": 4, "train_lo', "{", '{"step": 4, "train_loss": 1.0', "\x00\x00"])
def test_a_truncated_last_line_is_skipped(tmp_path: Path, cut: str) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 2, "train_loss": 2.0}\n' + cut)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2]
    write(tmp_path, RECIPE, 4, (6, {"train_loss": 6.0}))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [2, 6]


HOSTILE_LINES = {
    "list": b"[1]",
    "number": b"3",
    "null": b"null",
    "no step": b'{"train_loss": 1.0}',
    "step of 400 digits": b'{"step": 1' + b"0" * 400 + b"}",
    "step of 5,000 digits": b'{"step": 1' + b"0" * 5000 + b"}",
    "step of 2^31": b'{"step": 2147483648}',
    "negative step": b'{"step": -1}',
    "step a string": b'{"step": "4"}',
    "step true": b'{"step": true}',
    "step a float": b'{"step": 4.0}',
    "step a list": b'{"step": [4]}',
    "deep": b"[" * 50_000,
    "not UTF-8": b'{"step": 4, "x": "\xff"}',
    "NUL": b"\0" * 100,
    "100 MB": b'{"step": 4, "x": "' + b"x" * 100_000_000 + b'"}',
    "100 MB of digits": b'{"step": 4, "x": ' + b"1" * 100_000_000 + b"}",
}


@pytest.mark.parametrize("name", HOSTILE_LINES)
def test_invalid_lines_are_skipped(tmp_path: Path, name: str) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 2}\n' + HOSTILE_LINES[name] + b'\n{"step": 6}\n')
    with within_budget():
        assert read_metrics(tmp_path) == [{"step": 2}, {"step": 6}]


@pytest.mark.parametrize("value", ['"x"', "null", "true", "[1]", "{}", "1" + "0" * 400])
def test_values_that_are_not_numbers_are_skipped(tmp_path: Path, value: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 2, "train_loss": {value}, "val_loss": 1.5}}\n')
    assert read_metrics(tmp_path) == [{"step": 2, "val_loss": 1.5}]


def test_extreme_values_are_plotted_without_an_error(tmp_path: Path) -> None:
    values = ["NaN", "Infinity", "-Infinity", "1e308", "-1e308", "1e299", "-1e299", "-9223372036854775807"]
    lines = [f'{{"step": {step}, "train_loss": {value}}}\n' for step, value in enumerate(values)]
    (tmp_path / "a $\\frac$ b").mkdir()
    (tmp_path / "a $\\frac$ b" / "metrics.jsonl").write_text("".join(lines))
    assert plot_losses(tmp_path / "a $\\frac$ b").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_log_that_is_not_a_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"metrics.jsonl' is not a regular file"):
        read_metrics(tmp_path)


def test_a_log_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, RECIPE, 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
    try:
        for write_or_close in (lambda: metrics.write(1, {"train_loss": 1.0}), metrics.close):
            with pytest.raises(TrainingError, match=r"cannot write '.*metrics\.jsonl': File too large"):
                write_or_close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_run_that_has_logged_nothing_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []


@pytest.mark.parametrize(
    "records", [(), ((0, {"val_loss": 3.0}), (2, {"train_loss": 2.0}), (4, {"train_loss": 1.5, "val_loss": 1.8}))]
)
def test_the_plot_is_a_png(tmp_path: Path, records: Any) -> None:
    write(tmp_path, RECIPE, 0, *records)
    written = plot_losses(tmp_path)
    assert written == tmp_path / "loss.png"
    assert written.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_tensorboard_reads_what_is_written_for_it(tmp_path: Path) -> None:
    write(tmp_path, recipe(tensorboard=True), 0, (2, {"train_loss": 2.5, "val_loss": 3.0}), (4, {"train_loss": 1.5}))
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    [file] = (tmp_path / "tensorboard").iterdir()
    found = {
        (value.tag, event.step, round(value.tensor.float_val[0], 6))
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
    }
    assert found == {("train_loss", 2, 2.5), ("val_loss", 2, 3.0), ("train_loss", 4, 1.5)}


class FakeWandb:
    """Records the calls of `wandb`."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> SimpleNamespace:
        self.runs.append(options)
        return SimpleNamespace(log=lambda values, step: self.logged.append((step, values)), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


def test_weights_and_biases_gets_the_records_and_a_resumed_run_continues_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = recipe(wandb="project")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    write(tmp_path / "one", config, 0, (2, {"train_loss": 2.0, "mfu": None}))
    write(tmp_path / "one", config, 2, (4, {"train_loss": 1.0}))
    write(tmp_path / "two", config, 0)
    write(tmp_path / "one", config, 0)  # started again
    assert wandb.logged == [(2, {"train_loss": 2.0}), (4, {"train_loss": 1.0})]
    assert wandb.finished == 4
    first, resumed, other, anew = wandb.runs
    assert (first["project"], first["name"], first["resume"]) == ("project", "one", "allow")
    assert first["config"]["n_layer"] == 2
    assert resumed["id"] == first["id"]
    assert len({first["id"], other["id"], anew["id"]}) == 3


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_package_that_is_missing_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ImportError
    with pytest.raises(TrainingError, match=rf"--{name} needs .* pip install 'gpt2-bridge\[{name}\]'"):
        Metrics(tmp_path, recipe(**{name: value}), 0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "value"), [("tensorboard", True), ("wandb", "project")])
def test_a_missing_package_ends_a_run_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    text = write_text(tmp_path)
    before = files(tmp_path)
    config = recipe(**{name: value}, data=str(text))
    with pytest.raises(TrainingError, match=f"--{name} needs"):
        run_training(config, tmp_path / "run", cache=tmp_path / "cache")
    assert files(tmp_path) == before
    data = data_for(config, tmp_path)
    with pytest.raises(TrainingError, match=f"--{name} needs"):
        train(resolve_config(config, data), tmp_path / "run", data)
    assert not (tmp_path / "run").exists()


def test_the_flops_of_a_token_are_6n_and_12ldt() -> None:
    """GPT-2 of 124M: Chowdhery et al. 2022, appendix B, by hand."""
    weights = 12 * (12 * 768**2 + 13 * 768) + 50257 * 768 + 2 * 768  # layers, embedding, last norm; no positions
    assert weights == 124_439_808 - 1024 * 768
    assert flops_per_token(GPT2_SIZES["gpt2"], 1024) == 6 * weights + 12 * 12 * 768 * 1024
    assert flops_per_token(GPT2Config(), 512) == 6 * weights + 12 * 12 * 768 * 512


# jax.Device.device_kind, and the dense bfloat16 TFLOP/s of the data sheet.
PEAKS = {
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA L4": 121,
    "NVIDIA L40": 181,
    "NVIDIA L40S": 362,
    "TPU v4": 275,
    "TPU v5 lite": 197,
    "TPU v5e": 197,
    "TPU v5": 459,
    "TPU v5p": 459,
    "TPU v6 lite": 918,
    "TPU v6e": 918,
}


@pytest.mark.parametrize("kind", PEAKS)
def test_the_peak_of_a_known_device_is_that_of_its_data_sheet(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=kind)])
    monkeypatch.setattr(hardware, "measured_peak_flops", lambda dtype: 1.0)
    assert peak_flops("bfloat16") == (PEAKS[kind] * 1e12, f"{kind} data sheet")
    assert peak_flops("float32") == (1.0, f"measured on {kind}")  # the data sheets give bfloat16


def test_the_peak_of_another_device_is_measured() -> None:
    measured = hardware.measured_peak_flops.__wrapped__("float32", size=128, repeats=1)
    assert 1e6 < measured < 1e15
