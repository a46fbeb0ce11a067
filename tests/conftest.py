"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Set before torch is imported. For small models, several threads spend more time on synchronization than one thread
# takes to compute, and ten times as much if another worker uses the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import jax
import pytest
from support.compilations import KEEP_ALL, kept_compilations
from support.samples import mark_thorough

MEMORY_DISK = Path("/dev/shm")
MEMORY_DISK_BYTES = 4 * 2**30
"""Free space required for the temporary files of a complete run, with a margin."""

LENGTHY_FOLDERS = {"faults", "fuzz", "overwriting"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fast",
        action="store_true",
        help="only the first case of each parametrized test, and no tests that train, start processes or fuzz",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Keep compiled programs in pytest's cache directory, and temporary files in memory.

    `pytest --cache-clear` removes the programs. Every write of this project waits for the disk (fsync), so temporary
    files are written to memory unless `--basetemp`, `TMPDIR` or `PYTEST_DEBUG_TEMPROOT` chooses another place.
    """
    if (cache := getattr(config, "cache", None)) is not None:  # None with `-p no:cacheprovider`
        stack = ExitStack()
        stack.enter_context(
            kept_compilations(cache.mkdir("compilations") / os.environ.get("PYTEST_XDIST_WORKER", "main"))
        )
        config.add_cleanup(stack.close)
    if "TMPDIR" not in os.environ and os.access(MEMORY_DISK, os.W_OK):
        if shutil.disk_usage(MEMORY_DISK).free >= MEMORY_DISK_BYTES:
            os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY_DISK))  # pytest reads it on first use


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases that `make test` leaves out. With `--fast`, keep one case of each test that is not lengthy."""
    mark_thorough(items)
    if not config.getoption("--fast"):
        return
    kept: dict[str, pytest.Item] = {}
    for item in items:
        if not _is_lengthy(item):
            kept.setdefault(item.nodeid.partition("[")[0], item)
    chosen = set(kept.values())
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = kept.values()


def _is_lengthy(item: pytest.Item) -> bool:
    """Whether a test trains or compiles much, starts child processes, or tries many random inputs."""
    folders = item.path.relative_to(Path(__file__).parent).parts[:-1]
    fixtures = getattr(item, "fixturenames", ())
    return (
        not LENGTHY_FOLDERS.isdisjoint(folders)
        or "compiling_quickly" in fixtures
        or hasattr(getattr(item, "module", None), "subprocess")
    )


NO_TORCH = find_spec("torch") is None
NEEDS_TORCH = "needs torch, which is not installed"


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a module that imports torch where torch is not installed (`make test-newest`). Other errors stay errors."""
    report = yield
    if NO_TORCH and report.failed and "No module named 'torch'" in str(report.longrepr):
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: {NEEDS_TORCH}")
    return report


def _skip_without_torch() -> Generator[None, Any, Any]:
    """Skip a test or fixture that imports torch itself where torch is not installed."""
    try:
        return (yield)
    except ModuleNotFoundError as error:
        if NO_TORCH and error.name == "torch":
            pytest.skip(NEEDS_TORCH)
        raise


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from _skip_without_torch())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from _skip_without_torch())


@pytest.fixture
def x64() -> Iterator[None]:
    """Enable float64 in JAX for one test. Other tests use the default of float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def compiling_quickly(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], AbstractContextManager[None]]:
    """Return a context for compiling training steps: few optimizations, and a cache that child processes share."""
    few_optimizations = {"jax_disable_most_optimizations": True}
    of_children = {
        **few_optimizations,
        **KEEP_ALL,
        "jax_compilation_cache_dir": tmp_path_factory.mktemp("compilations"),  # not kept: tests kill child processes
        # XLA of jaxlib 0.10.0 logs 2.5 KB for each cached program on an Intel CPU (openxla/xla issue 44565). A child
        # whose output nobody reads yet would fill its pipe and wait for ever.
        "tf_cpp_min_log_level": 3,
    }

    @contextmanager
    def quickly() -> Iterator[None]:
        before = {name: jax.config.values[name] for name in few_optimizations}
        with pytest.MonkeyPatch.context() as environment:
            for name, value in of_children.items():
                environment.setenv(name.upper(), str(value))
            try:
                for name, value in few_optimizations.items():
                    jax.config.update(name, value)
                yield
            finally:
                for name, value in before.items():
                    jax.config.update(name, value)

    return quickly


@pytest.fixture(scope="module")
def optimized_compilation() -> Iterator[None]:
    """Compile with all optimizations in all tests of a module. For rounding, and for programs that run long."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_compilation(compiling_quickly: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Compile quickly in all tests of a module, and in fixtures that request this one."""
    with compiling_quickly():
        yield


@pytest.fixture(scope="session")
def batch_invariance() -> None:
    """Skip the test on a CPU for which XLA computes some slots differently, so that `batch_invariant` is refused."""
    from support.models import random_checkpoint

    import gpt2_jax
    from bridge import GPT2Config
    from gpt2_jax.decoding.batch_invariance import SLOTS, BatchInvarianceError

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NPROC", "1")
        for dtype in ("float32", "bfloat16"):
            model = gpt2_jax.model_from_checkpoint(random_checkpoint(config))
            slots = gpt2_jax.Decoder(*model, dtype=dtype, batch_invariant=True).slots
            assert slots is not None
            try:
                slots.empty_cache(SLOTS, 32)
            except BatchInvarianceError as reason:
                pytest.skip(str(reason))
