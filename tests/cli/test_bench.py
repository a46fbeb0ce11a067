"""`gpt2 bench`: worker processes at tiny sizes, hand-computed arithmetic, and workers that fail."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from support.commands import needs_torch, run
from support.models import SMALLEST, huggingface_directory

import bridge
from bridge import BridgeError
from gpt2_jax.bench.cases import Case, benchmark_config, make_cases, with_sizes
from gpt2_jax.bench.limits import min_bytes, min_flops
from gpt2_jax.bench.measure import Comparison, DeviceRates, Measurement
from gpt2_jax.bench.peers import PEERS, choose_peers
from gpt2_jax.bench.process import Worker, WorkerError, worker_environment
from gpt2_jax.bench.report import Report, Result
from gpt2_jax.bench.summary import summarize
from gpt2_jax.bench.worker import FILES
from gpt2_jax.console.terminal import console
from gpt2_jax.training import PRESETS, TrainConfig

pytestmark = [pytest.mark.processes, pytest.mark.usefixtures("quick_compilation")]

TINY = ("--preset", "shakespeare-char", "--batch-size", 2, "--seq-len", 8, "--rounds", 1)
CONFIG = replace(PRESETS["shakespeare-char"], model=SMALLEST, batch_size=2, seq_len=3)


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose modules replace installed modules of the same name, in workers only."""
    directory = tmp_path / "blocked"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return directory


@needs_torch
def test_a_run_writes_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "bench.json", tmp_path / "bench.png"
    tasks = ("--tasks", "train", "convert", "--peers", "torch")
    assert run("bench", *TINY, *tasks, "--json", files[0], "--plot", files[1]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for expected in ("train, 2 x 8", "GFLOP/s", "tokens/s", "jax", "torch", "convert", "cp", "Not measured:"):
        assert expected in printed.out
    found = json.loads(files[0].read_text())
    assert found["failures"] == []
    assert found["versions"].keys() >= {"jax", "torch", "transformers"}
    assert found["cores"] >= 1
    train, convert = found["results"]
    assert (train["batch_size"], train["seq_len"], train["tokens"]) == (2, 8, 16)
    [comparison] = train["comparisons"]
    ours, theirs = comparison["measurements"]
    assert [m["implementation"] for m in (ours, theirs)] == ["jax", "torch"]
    assert comparison["relative_times"] == [theirs["seconds"][0] / ours["seconds"][0]]
    assert len(comparison["device_rates"]) == 2  # before and after the round
    for measured in (ours, theirs):
        assert 0 < measured["first_run_seconds_after_imports"] < measured["first_run_seconds"]
        assert 0 < measured["peak_bytes_after_imports"] < measured["peak_bytes"]
        assert measured["first_loss"] == pytest.approx(math.log(65), abs=0.5)  # random weights guess uniformly
    assert [m["implementation"] for m in convert["comparisons"][0]["measurements"]] == ["convert", "cp"]
    assert imread(files[1])[..., :3].std() > 0.1  # the picture is not empty


@pytest.mark.parametrize(
    "name", ["jax", pytest.param("torch", marks=needs_torch), pytest.param("transformers", marks=needs_torch)]
)
def test_each_implementation_has_each_task(name: str, tmp_path: Path, blocked: Path) -> None:
    if name != "jax":
        (blocked / "jax.py").write_text("raise ImportError('a peer imports JAX')")
    directory = huggingface_directory(tmp_path / "model", SMALLEST)
    with Worker(name) as worker:
        worker.request("import")
        for task in PEERS["torch"].tasks:
            sizes = {"prompt_len": 2, "new_tokens": 2} if task == "decode" else {"seq_len": 3}
            case = Case(task, CONFIG, 1, directory=str(directory), **sizes)
            worker.request("prepare", job=case.job())
            done = worker.request("run", iterations=2)
            assert done["seconds"] > 0
            assert (done["value"] is None) == (task != "train")
        assert worker.request("info")["device"]


@needs_torch
def test_a_failed_implementation_is_reported_and_the_others_continue(
    tmp_path: Path, blocked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blocked / "torch.py").write_text("raise MemoryError('no room for torch\\nand more')")
    out = tmp_path / "bench.json"
    assert run("bench", *TINY, "--tasks", "load", "--peers", "torch", "--json", out, "--plot", tmp_path / "b.svg") == 1
    printed = capsys.readouterr()
    assert "torch failed: MemoryError: no room for torch\n" in printed.out
    assert "Traceback" not in printed.out + printed.err
    found = json.loads(out.read_text())
    assert found["failures"] == ["load: torch: MemoryError: no room for torch"]
    ours, theirs = found["results"][0]["comparisons"][0]["measurements"]
    assert (len(ours["seconds"]), len(theirs["seconds"])) == (1, 0)


def test_device_rates_that_cannot_be_measured_are_omitted(blocked: Path) -> None:
    (blocked / "jax.py").write_text("raise ImportError('no JAX')")
    with ExitStack() as stack:
        rates = DeviceRates(stack, "float32")
        assert rates.measure(None) == []
        assert rates.failure is None
        assert rates.measure("flops") == []
        assert rates.failure == "ImportError: no JAX"


def test_a_killed_worker_reports_the_signal() -> None:
    with Worker("cp") as worker:
        assert worker.request("import")["peak_bytes"] < 150 * 2**20  # the worker's own peak, not that of this process
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="killed by SIGKILL, probably because memory ran out"):
            worker.request("info")


def test_workers_keep_the_users_environment() -> None:
    settings = worker_environment({"GLIBC_TUNABLES": "glibc.malloc.check=0", "PYTHONPATH": "mine", "HOME": "h"})
    assert settings["PYTHONPATH"].split(os.pathsep)[1:] == ["mine"]
    assert settings["HOME"] == "h"
    if sys.platform.startswith("linux"):
        assert settings["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
        assert (
            worker_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"})["GLIBC_TUNABLES"]
            == "glibc.malloc.hugetlb=2"
        )


# SMALLEST: V 11, P 5, D 8, L 2, F 12.


def test_min_flops_of_a_step() -> None:
    weights = 2 * (8 * 24 + 8 * 8 + 8 * 12 + 12 * 8) + 11 * 8
    assert weights == 984
    forward = 2 * 3 * 2 * weights + 2 * 2 * (2 * 2 * 3 * 3 * 8) / 2  # half of each layer's attention products
    assert min_flops("forward", SMALLEST, batch_size=2, seq_len=3) == forward == 12384
    assert min_flops("train", SMALLEST, batch_size=2, seq_len=3) == 3 * 12384


def test_min_bytes_of_a_token() -> None:
    layer = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 16
    assert min_bytes(SMALLEST, "float32") == 4 * (11 * 8 + 8 + 2 * layer + 16)
    assert min_bytes(SMALLEST, "bfloat16") == 2 * (11 * 8 + 8 + 2 * layer + 16)


def made_up_comparisons() -> list[Comparison]:
    torch = [
        Measurement("jax", seconds=[1.0, 2.0, 4.0], first_run_seconds=9.0, peak_bytes=70),
        Measurement("torch", seconds=[2.0, 6.0, 2.0]),
    ]
    other = [
        Measurement("jax", seconds=[3.0, 3.0], first_run_seconds=7.0, peak_bytes=80),
        Measurement("transformers", seconds=[1.5], failure="gone"),
    ]
    return [
        Comparison(torch, device_rates=[12384.0, 37152.0, 37152.0]),
        Comparison(other, device_rates=[74304.0, 12384.0]),
    ]


def test_relative_times_are_per_round_and_all_rows_share_one_limit() -> None:
    ours, torch, other = summarize(Case("train", CONFIG, 2, 3), made_up_comparisons())
    assert (ours.median, ours.relative_times, ours.first_run_seconds, ours.peak_bytes) == (3.0, [], 8.0, 80)
    assert torch.relative_times == [2.0, 3.0, 0.5]
    assert (torch.median, torch.tokens_per_second) == (2.0, 3.0)
    assert other.relative_times == [0.5]  # it failed before the second round
    assert other.failure == "gone"
    assert {row.limit_seconds for row in (ours, torch, other)} == {1.0}  # 3 x 12384 at the median of all rates
    assert (ours.fraction_of_limit, torch.fraction_of_limit) == (1 / 3, 0.5)


def test_the_report_warns_of_exceeded_limits_and_a_busy_machine(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = [Comparison([Measurement("jax", seconds=[0.5], device="CPU")], device_rates=[37152.0])]
    result = Result(Case("train", CONFIG, 2, 3), quick, ["torch-compiled"])
    report = Report(CONFIG, [result], {"flops": "made up"}, None, load_before=1000.0)
    report.show(console())
    printed = capsys.readouterr().out
    for expected in (
        "200%",
        "exceeds the measured limit",
        "load average 1000.0",
        "made up",
        "without this task: torch-compiled",
    ):
        assert expected in printed
    assert json.loads(json.dumps(report.to_json()))["results"][0]["summary"][0]["fraction_of_limit"] == 2.0


def test_decoding_is_timed_per_token_and_shorter_in_short_models(tmp_path: Path) -> None:
    [short] = make_cases("decode", [CONFIG], tmp_path)
    [long] = make_cases("decode", [PRESETS["nano"]], tmp_path)
    assert (short.prompt_len, short.new_tokens) == (2, 3)
    assert (long.prompt_len, long.new_tokens, long.tokens) == (16, 64, 1)
    assert long.work == min_bytes(PRESETS["nano"].model, "float32")


def test_every_combination_of_sizes_is_measured(tmp_path: Path) -> None:
    sizes = with_sizes(CONFIG, batch_sizes=(1, 4), seq_lens=(2, 5))
    train = list(make_cases("train", sizes, tmp_path))
    [_] = make_cases("decode", sizes, tmp_path)  # one case, independent of the sizes
    assert [(case.batch_size, case.seq_len) for case in train] == [(1, 2), (1, 5), (4, 2), (4, 5)]


def test_the_config_is_the_presets_with_adamw_and_without_dropout() -> None:
    config = benchmark_config("shakespeare", dtype=None, scan=False, vocab_multiple=128)
    assert isinstance(config, TrainConfig)
    assert (config.optimizer.optimizer, config.model.resid_pdrop, config.scan) == ("adamw", 0.0, False)
    assert (config.vocab_multiple, config.dtype, config.batch_size) == (128, "float32", 16)
    large = benchmark_config("gpt2")
    assert (large.batch_size, large.num_microbatches, large.dtype) == (12, 1, "bfloat16")
    assert asdict(large.model) == asdict(replace(bridge.GPT2_SIZES["gpt2"], embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))


@needs_torch
def test_default_peers_are_installed_and_need_no_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_peers(None) == ["torch", "transformers"]
    assert choose_peers(["all"]) == list(PEERS)
    assert choose_peers(["transformers", "all"])[0] == "transformers"
    assert choose_peers([]) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    assert choose_peers(None) == ["torch"]
    assert choose_peers(["all"]) == ["torch", "torch-compiled"]
    with pytest.raises(BridgeError, match="--peers transformers: transformers is not installed"):
        choose_peers(["transformers"])


BAD = {
    "unknown peer": (("--peers", "keras"), "--peers keras: must be one of torch"),
    "unknown preset": (("--preset", "tiny"), "--preset tiny: must be one of nano"),
    "more tokens than positions": (("--seq-len", "8", "999"), "--seq-len 999"),
    "no tokens": (("--seq-len", "0"), "--seq-len 0"),
    "no sequences": (("--batch-size", "0"), "--batch-size 0"),
    "no rounds": (("--rounds", "0"), "--rounds 0"),
    "no tasks": (("--tasks",), "--tasks"),
    "scan and not": (("--scan", "--no-scan"), "contradict each other"),
    "unknown remat": (("--remat", "some"), "remat"),
    "no multiple": (("--vocab-multiple", "0"), "vocab_multiple"),
    "unwritable plot": (("--plot", "{tmp}/nowhere/x.png"), "cannot write"),
    "plot of no format": (("--plot", "{tmp}/x.txt"), "must end in .png"),
    "unwritable json": (("--json", "{tmp}/nowhere/x.json"), "cannot write"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_ends_with_2_and_a_message(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD[name]
    assert run("bench", *(a.format(tmp=tmp_path) for a in arguments)) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_the_command_imports_no_peer_and_every_peer_has_a_worker() -> None:
    code = "import sys, gpt2_jax.cli; print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
    assert FILES.keys() == {"jax", *PEERS, "convert", "cp", "limits"}


def test_peers_are_spelled_out_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("bench", "--help") == 0
    words = set(re.findall(r"[a-z-]+", capsys.readouterr().out))
    assert words >= set(PEERS)
