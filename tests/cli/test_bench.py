"""`gpt2 bench`: real processes at tiny sizes, the arithmetic by hand, and what happens when one of them dies."""

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
from support.commands import run
from support.models import SMALLEST, huggingface_directory

import bridge
from bridge import BridgeError
from gpt2_jax.bench.cases import Case, at_sizes, cases_of, recipe
from gpt2_jax.bench.limits import needed_bytes, needed_flops
from gpt2_jax.bench.measure import Limits, Measured, Pair
from gpt2_jax.bench.peers import PEERS, chosen_peers
from gpt2_jax.bench.process import Worker, WorkerDied, environment
from gpt2_jax.bench.report import Report, Result
from gpt2_jax.bench.summary import summaries
from gpt2_jax.bench.worker import FILES
from gpt2_jax.console.terminal import console
from gpt2_jax.training.config import PRESETS, TrainConfig

pytestmark = pytest.mark.usefixtures("quick_compilation")

TINY = ("--preset", "shakespeare-char", "--batch", 2, "--seq-len", 8, "--pairs", 1)
CONFIG = replace(PRESETS["shakespeare-char"], model=SMALLEST, batch_size=2, seq_len=3)


@pytest.fixture
def blocked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Modules written here stand before the installed ones of their names, in workers alone."""
    directory = tmp_path / "blocked"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(directory))
    return directory


def test_a_run_gives_table_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    assert (train["batch"], train["length"], train["tokens"]) == (2, 8, 16)
    [pair] = train["pairs"]
    ours, theirs = pair["measured"]
    assert [m["implementation"] for m in (ours, theirs)] == ["jax", "torch"]
    assert pair["ratios"] == [theirs["seconds"][0] / ours["seconds"][0]]
    assert len(pair["rates"]) == 2  # before and after the turn
    for measured in (ours, theirs):
        assert 0 < measured["first_after_imports"] < measured["first"]
        assert 0 < measured["peak_bytes_after_imports"] < measured["peak_bytes"]
        assert measured["first_loss"] == pytest.approx(math.log(65), abs=0.5)  # random weights know nothing
    assert [m["implementation"] for m in convert["pairs"][0]["measured"]] == ["convert", "cp"]
    assert imread(files[1])[..., :3].std() > 0.1  # there is something on it


@pytest.mark.parametrize("name", ["jax", "torch", "transformers"])
def test_each_implementation_has_each_task(name: str, tmp_path: Path, blocked: Path) -> None:
    if name != "jax":
        (blocked / "jax.py").write_text("raise ImportError('the peers are measured without JAX')")
    directory = huggingface_directory(tmp_path / "model", SMALLEST)
    with Worker(name) as worker:
        worker.ask("import")
        for task in PEERS["torch"].tasks:
            length, prompt = (2, 2) if task == "decode" else (3, 0)
            case = Case(task, CONFIG, 1, length, prompt, str(directory))
            worker.ask("prepare", job=case.job())
            done = worker.ask("run", times=2)
            assert done["seconds"] > 0
            assert (done["value"] is None) == (task != "train")
        assert worker.ask("about")["device"]


def test_what_dies_is_named_and_the_rest_goes_on(
    tmp_path: Path, blocked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blocked / "torch.py").write_text("raise MemoryError('no room for torch\\nand more')")
    out = tmp_path / "bench.json"
    assert run("bench", *TINY, "--tasks", "load", "--peers", "torch", "--json", out, "--plot", tmp_path / "b.svg") == 1
    printed = capsys.readouterr()
    assert "torch died: MemoryError: no room for torch\n" in printed.out
    assert "Traceback" not in printed.out + printed.err
    found = json.loads(out.read_text())
    assert found["failures"] == ["load: torch: MemoryError: no room for torch"]
    ours, theirs = found["results"][0]["pairs"][0]["measured"]
    assert (len(ours["seconds"]), len(theirs["seconds"])) == (1, 0)


def test_limits_that_cannot_be_measured_are_left_out(blocked: Path) -> None:
    (blocked / "jax.py").write_text("raise ImportError('no JAX')")
    with ExitStack() as stack:
        limits = Limits(stack, "float32")
        assert limits.rate(None) == []
        assert limits.failure is None
        assert limits.rate("flops") == []
        assert limits.failure == "ImportError: no JAX"


def test_a_worker_that_is_killed_says_by_what() -> None:
    with Worker("cp") as worker:
        assert worker.ask("import")["peak_bytes"] < 150 * 2**20  # its own, not this process's
        os.kill(worker._process.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied, match="killed by SIGKILL, as the system does when memory runs out"):
            worker.ask("about")


def test_workers_keep_what_the_user_has_set() -> None:
    settings = environment({"GLIBC_TUNABLES": "glibc.malloc.check=0", "PYTHONPATH": "mine", "HOME": "h"})
    assert settings["PYTHONPATH"].split(os.pathsep)[1:] == ["mine"]
    assert settings["HOME"] == "h"
    if sys.platform.startswith("linux"):
        assert settings["GLIBC_TUNABLES"] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"
        assert environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=2"})["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=2"


# SMALLEST: V 11, P 5, D 8, L 2, F 12.


def test_the_arithmetic_that_a_step_needs() -> None:
    weights = 2 * (8 * 24 + 8 * 8 + 8 * 12 + 12 * 8) + 11 * 8
    assert weights == 984
    forward = 2 * 3 * 2 * weights + 2 * 2 * (2 * 2 * 3 * 3 * 8) / 2  # a layer's scores and sums over values, halved
    assert needed_flops("forward", SMALLEST, batch=2, length=3) == forward == 12384
    assert needed_flops("train", SMALLEST, batch=2, length=3) == 3 * 12384


def test_the_bytes_that_a_token_needs() -> None:
    layer = (8 * 24 + 24) + (8 * 8 + 8) + (8 * 12 + 12) + (12 * 8 + 8) + 2 * 16
    assert needed_bytes(SMALLEST, "float32") == 4 * (11 * 8 + 8 + 2 * layer + 16)
    assert needed_bytes(SMALLEST, "bfloat16") == 2 * (11 * 8 + 8 + 2 * layer + 16)


def pairs_by_hand() -> list[Pair]:
    torch = [
        Measured("jax", seconds=[1.0, 2.0, 4.0], first=9.0, peak_bytes=70),
        Measured("torch", seconds=[2.0, 6.0, 2.0]),
    ]
    other = [Measured("jax", seconds=[3.0, 3.0], first=7.0, peak_bytes=80), Measured("transformers", seconds=[1.5])]
    other[1].failure = "gone"
    return [Pair(torch, rates=[12384.0, 37152.0, 37152.0]), Pair(other, rates=[74304.0, 12384.0])]


def test_ratios_are_of_neighbouring_turns_and_shares_of_one_limit() -> None:
    ours, torch, other = summaries(Case("train", CONFIG, 2, 3), pairs_by_hand())
    assert (ours.median, ours.ratios, ours.first, ours.peak_bytes) == (3.0, [], 8.0, 80)
    assert torch.ratios == [2.0, 3.0, 0.5]
    assert (torch.median, torch.tokens_per_second) == (2.0, 3.0)
    assert other.ratios == [0.5]  # it died before the second turn
    assert other.failure == "gone"
    assert {row.bound for row in (ours, torch, other)} == {1.0}  # 3 x 12384 at the median rate of both pairs
    assert (ours.share, torch.share) == (1 / 3, 0.5)


def test_the_report_says_who_is_above_the_limit_and_that_the_machine_was_busy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    quick = [Pair([Measured("jax", seconds=[0.5], device="CPU")], rates=[37152.0])]
    result = Result(Case("train", CONFIG, 2, 3), quick, ["torch-compiled"])
    report = Report(CONFIG, [result], {"flops": "by hand"}, None, load_before=1000.0)
    report.show(console())
    printed = capsys.readouterr().out
    for expected in ("200%", "above the limit", "load average 1000.0", "by hand", "not in this task: torch-compiled"):
        assert expected in printed
    assert json.loads(json.dumps(report.to_json()))["results"][0]["summary"][0]["share"] == 2.0


def test_decoding_is_a_token_and_short_models_decode_less(tmp_path: Path) -> None:
    [short] = cases_of("decode", [CONFIG], tmp_path)
    [long] = cases_of("decode", [PRESETS["nano"]], tmp_path)
    assert (short.prompt, short.length) == (2, 3)
    assert (long.prompt, long.length, long.tokens) == (16, 64, 1)
    assert long.work == needed_bytes(PRESETS["nano"].model, "float32")


def test_every_size_that_was_asked_for_is_measured(tmp_path: Path) -> None:
    sizes = at_sizes(CONFIG, batch=(1, 4), seq_len=(2, 5))
    train = list(cases_of("train", sizes, tmp_path))
    [_] = cases_of("decode", sizes, tmp_path)  # which has a size of its own
    assert [(case.batch, case.length) for case in train] == [(1, 2), (1, 5), (4, 2), (4, 5)]


def test_the_recipe_is_the_presets_with_adamw_and_without_dropout() -> None:
    config = recipe("shakespeare", dtype=None, scan=False, vocab_multiple=128)
    assert isinstance(config, TrainConfig)
    assert (config.optimizer.optimizer, config.model.resid_pdrop, config.scan) == ("adamw", 0.0, False)
    assert (config.vocab_multiple, config.dtype, config.batch_size) == (128, "float32", 16)
    large = recipe("gpt2")
    assert (large.batch_size, large.num_microbatches, large.dtype) == (12, 1, "bfloat16")
    assert asdict(large.model) == asdict(replace(bridge.GPT2_SIZES["gpt2"], embd_pdrop=0, attn_pdrop=0, resid_pdrop=0))


def test_peers_are_those_installed_that_need_no_compiling_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen_peers(None) == ["torch", "transformers"]
    assert chosen_peers(["all"]) == list(PEERS)
    assert chosen_peers(["transformers", "all"])[0] == "transformers"
    assert chosen_peers([]) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else object())
    assert chosen_peers(None) == ["torch"]
    assert chosen_peers(["all"]) == ["torch", "torch-compiled"]
    with pytest.raises(BridgeError, match="--peers transformers: transformers is not installed"):
        chosen_peers(["transformers"])


BAD = {
    "unknown peer": (("--peers", "keras"), "--peers keras: must be one of torch"),
    "unknown preset": (("--preset", "tiny"), "--preset tiny: must be one of nano"),
    "more tokens than positions": (("--seq-len", "8", "999"), "--seq-len 999"),
    "no tokens": (("--seq-len", "0"), "--seq-len 0"),
    "no rows": (("--batch", "0"), "--batch 0"),
    "no pairs": (("--pairs", "0"), "--pairs 0"),
    "no tasks": (("--tasks",), "--tasks"),
    "scan and not": (("--scan", "--no-scan"), "opposites"),
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
