"""Packages run without the other framework, as child processes show, and modules import no higher layers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import needs_torch
from support.import_graph import ALLOWED_IN_BRIDGE, cycles, import_graph, other_packages, upward_imports
from support.models import SMALLEST, huggingface_directory

import bridge

ROOT = Path(__file__).parents[1]

BLOCKER = """
import sys

class Blocked(ModuleNotFoundError):
    pass

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise Blocked(f"{name} is blocked here", name=name)

BLOCKED = set(sys.argv[1].split(","))
assert not BLOCKED & set(sys.modules), "blocked too late"
sys.meta_path.insert(0, Blocker())
"""

JAX = ("jax", "jaxlib", "flax", "optax")
TORCH = ("torch", "transformers")
OTHER = ("huggingface_hub", "tiktoken", "rich", "tyro")


def run_without(blocked: tuple[str, ...], code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new process in which importing a blocked package raises ModuleNotFoundError."""
    command = [sys.executable, "-W", "error", "-c", BLOCKER + code, ",".join(blocked), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, check=False)


def assert_runs_without(blocked: tuple[str, ...], code: str, *arguments: Path) -> None:
    done = run_without(blocked, code + "\nassert not BLOCKED & set(sys.modules)\nprint('reached the end')", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("reached the end\n")


def test_a_conversion_there_and_back_runs_with_neither_framework(tmp_path: Path) -> None:
    code = """
import bridge
source, target = sys.argv[2:4]
checkpoint = bridge.load(source)
params = bridge.to_flax(checkpoint.tensors, checkpoint.config, stacked=True, vocab_multiple=64)
state = bridge.to_torch(params, checkpoint.config, vocab_multiple=64)
from bridge import optimizer_state
adamw_state = optimizer_state.from_flax(1, params, params, checkpoint.config, vocab_multiple=64)
stored = optimizer_state.to_torch(adamw_state, list(state), [{"params": list(range(len(state)))}])
assert optimizer_state.from_torch(stored, list(state), checkpoint.config).step == 1
bridge.save(bridge.Checkpoint.of(state, checkpoint.config), target + "/flax", format="flax")
bridge.save(bridge.load(target + "/flax"), target + "/huggingface", format="huggingface")
back = bridge.load(target + "/huggingface").tensors
assert all((back[name] == array).all() for name, array in checkpoint.tensors.items())
"""
    assert_runs_without((*TORCH, *JAX, *OTHER), code, huggingface_directory(tmp_path / "source"), tmp_path)


@needs_torch
def test_the_reference_computes_logits_without_jax(tmp_path: Path) -> None:
    code = """
import torch
import gpt2_torch
model = gpt2_torch.GPT2.from_pretrained(sys.argv[2])
logits = model(torch.arange(34).reshape(2, 17))
assert logits.shape == (2, 17, 257) and logits.isfinite().all()
"""
    assert_runs_without((*JAX, "transformers"), code, huggingface_directory(tmp_path / "source"))


@pytest.mark.processes
@needs_torch
def test_the_reference_trains_without_jax(tmp_path: Path) -> None:
    code = """
import torch
import gpt2_torch, gpt2_torch.training
model = gpt2_torch.GPT2.from_pretrained(sys.argv[2])
ids = torch.arange(36).reshape(2, 18)
optimizer = gpt2_torch.training.adamw(model)
batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
loss, norm = gpt2_torch.training.train_step(model, optimizer, batch, learning_rate=1e-3)
assert loss.isfinite() and norm.isfinite()
assert gpt2_torch.training.adamw_state(optimizer, model).step == 1
"""
    assert_runs_without((*JAX, "transformers"), code, huggingface_directory(tmp_path / "source"))


def test_the_port_computes_logits_without_torch(tmp_path: Path) -> None:
    code = """
import numpy as np
import gpt2_jax
model, params = gpt2_jax.from_pretrained(sys.argv[2])
logits = model.apply({"params": params}, np.arange(34).reshape(2, 17))
assert logits.shape == (2, 17, 257) and np.isfinite(logits).all()
"""
    assert_runs_without((*TORCH, "gpt2_torch"), code, huggingface_directory(tmp_path / "source"))


@pytest.mark.processes
@needs_torch
def test_a_checkpoint_is_verified_against_a_certificate_without_torch(tmp_path: Path) -> None:
    from gpt2_jax.parity import write_certificate
    from gpt2_jax.parity.certificates.certification import make_certificate
    from gpt2_jax.parity.inputs import CheckInputs, choose_tokens

    checkpoint = bridge.load(huggingface_directory(tmp_path / "source", SMALLEST))
    inputs = CheckInputs(checkpoint, choose_tokens(checkpoint, None, (2, SMALLEST.n_positions), 0))
    write_certificate(make_certificate(checkpoint, inputs), tmp_path / "certificate")
    code = """
from gpt2_jax.cli import main
try:
    main(["verify", sys.argv[2], "--against", sys.argv[3]])
except SystemExit as ended:
    assert ended.code == 0, ended.code
"""
    assert_runs_without((*TORCH, "gpt2_torch"), code, tmp_path / "source", tmp_path / "certificate")


@pytest.mark.processes
def test_jax_sides_and_goldens_are_compared_without_torch(tmp_path: Path) -> None:
    code = """
import numpy as np
from flax import linen as nn
from gpt2_jax.parity import compare, function_side, golden_side, linen_side, save_golden
params = {"kernel": np.arange(6.0).reshape(2, 3), "bias": np.ones(3)}
inputs = [np.ones((4, 2))]
function = function_side(lambda p, x: x @ p["kernel"] + p["bias"], params)
save_golden(sys.argv[2], function, inputs)
for left in (function, golden_side(sys.argv[2])):
    report = compare(left, linen_side(nn.Dense(3), {"params": params}), inputs)
    assert report.passed, report
"""
    assert_runs_without((*TORCH, "gpt2_torch"), code, tmp_path / "golden")


HEAVY = (*JAX, *TORCH, "gpt2_torch", "orbax", "grain", "tensorstore", "tokenizers", "matplotlib")
"""Packages whose import takes a noticeable time. Verbs that do not need them must start without them."""


def test_the_packages_are_imported_without_their_frameworks() -> None:
    assert_runs_without(HEAVY, "import bridge, gpt2_jax, gpt2_jax.data, gpt2_jax.training, gpt2_jax.cli")


def test_help_version_inspect_convert_and_diff_import_no_framework(tmp_path: Path) -> None:
    code = """
from gpt2_jax.cli import main
from gpt2_jax.cli.verbs import VERBS

def run(*arguments):
    try:
        main([*arguments])
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)

run("--help")
assert "numpy" not in sys.modules
run("--version")
for verb in VERBS:
    run(verb, "--help")
run("inspect")
run("convert", sys.argv[2], sys.argv[3], "--to", "flax")
run("diff", sys.argv[2], sys.argv[3])
"""
    source = huggingface_directory(tmp_path / "source")
    assert_runs_without(HEAVY, code, source, tmp_path / "flax")


@pytest.mark.parametrize(
    "imports",
    [
        "import torch",
        "from torch.nn import functional",
        "import importlib; importlib.import_module('torch.utils')",
        "def later():\n    import torch\nlater()",
    ],
)
def test_the_check_fails_if_a_blocked_package_is_imported(imports: str) -> None:
    done = run_without(TORCH, f"import bridge\n{imports}\nprint('reached the end')")
    assert done.returncode == 1
    assert "torch is blocked here" in done.stderr
    assert "reached the end" not in done.stdout
    with pytest.raises(AssertionError, match="torch is blocked here"):
        assert_runs_without(TORCH, imports)


def test_the_check_fails_if_a_higher_layer_needs_the_blocked_package() -> None:
    assert "torch is blocked here" in run_without(TORCH, "import gpt2_torch").stderr
    assert "jax is blocked here" in run_without(JAX, "import gpt2_jax; gpt2_jax.GPT2").stderr


def test_a_caught_import_of_a_blocked_package_can_fall_back() -> None:
    """Optional imports see the ordinary ModuleNotFoundError, with the name that is missing."""
    code = "try:\n    import torch\nexcept ModuleNotFoundError as error:\n    assert error.name == 'torch'"
    assert_runs_without(TORCH, code)


def test_no_module_imports_a_higher_one_and_none_are_circular() -> None:
    graph = import_graph()
    assert len(graph) > 100
    assert cycles(graph) == []
    assert upward_imports(graph) == []


def test_bridge_imports_only_allowed_packages() -> None:
    assert other_packages() == ALLOWED_IN_BRIDGE


def test_an_import_of_another_package_is_found_inside_a_function(tmp_path: Path) -> None:
    source = "import os\nimport numpy as np\nfrom bridge import x\ndef later():\n    from requests.adapters import y"
    assert other_packages(write_modules(tmp_path, bridge__a=source)) == {"numpy", "requests"}


def write_modules(root: Path, **sources: str) -> Path:
    """Write `bridge__config="..."` as `bridge/config.py`, and so on, with empty packages around them."""
    for name, source in sources.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
        for parent in path.relative_to(root).parents[:-1]:
            (root / parent / "__init__.py").touch()
    return root


@pytest.mark.parametrize(
    "statement",
    [
        "import bridge.io",
        "from bridge import io",
        "from bridge.io import load",
        "from .. import io",
        "from ..io import load",
        "def later():\n    from bridge.io import load",
        "class A:\n    def later(self):\n        if True:\n            import bridge.io as files",
    ],
)
def test_an_upward_import_is_found_anywhere_in_a_module(tmp_path: Path, statement: str) -> None:
    root = write_modules(tmp_path, bridge__storage__manifest=statement, bridge__io="load = None")
    assert upward_imports(import_graph(root, ["bridge"])) == [
        "bridge.storage.manifest imports bridge.io, which is above it"
    ]


def test_an_import_only_for_type_checking_does_not_count(tmp_path: Path) -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from bridge import io"
    root = write_modules(tmp_path, bridge__storage__manifest=source, bridge__io="")
    assert upward_imports(import_graph(root, ["bridge"])) == []


@pytest.mark.parametrize(
    "source",
    [
        "from typing import TYPE_CHECKING\nif not TYPE_CHECKING:\n    from bridge import io",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    from bridge import io",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelif True:\n    import bridge.io",
        "__getattr__, __dir__ = lazy_names(__name__, {'bridge.io': ('load',)})",
    ],
)
def test_an_import_at_run_time_counts_beside_one_for_type_checking_and_in_a_lazy_table(
    tmp_path: Path, source: str
) -> None:
    root = write_modules(tmp_path, bridge__storage__manifest=source, bridge__io="")
    assert upward_imports(import_graph(root, ["bridge"])) == [
        "bridge.storage.manifest imports bridge.io, which is above it"
    ]


def test_a_cycle_is_found_through_other_modules_and_inside_functions(tmp_path: Path) -> None:
    root = write_modules(
        tmp_path,
        bridge__formats__a="from bridge.formats import b",
        bridge__formats__b="import bridge.formats.c",
        bridge__formats__c="def later():\n    from bridge.formats.a import x",
        bridge__formats__d="import bridge.formats.a",
    )
    assert cycles(import_graph(root, ["bridge"])) == [["bridge.formats.a", "bridge.formats.b", "bridge.formats.c"]]


def test_a_module_without_a_layer_and_an_import_of_the_other_backend_are_found(tmp_path: Path) -> None:
    root = write_modules(
        tmp_path,
        bridge__novelty="",
        gpt2_torch__model="",
        gpt2_jax__data__documents="import gpt2_torch.model",
        gpt2_jax__parity__verify="import gpt2_torch.model",
    )
    assert upward_imports(import_graph(root)) == [
        "bridge.novelty has no layer",
        "gpt2_jax.data.documents imports gpt2_torch.model; only gpt2_jax.parity, gpt2_jax.bench, gpt2_jax.cli may",
    ]
