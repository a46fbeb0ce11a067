"""The imports between modules of the three packages, and the rules for them.

    python -m support.import_graph

prints every import cycle and every upward import, and exits with 1 if there is any. Imports inside functions count,
because they can form cycles too. Imports only for type checking do not count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("bridge", "gpt2_torch", "gpt2_jax")

Graph = Mapping[str, frozenset[str]]
"""Module -> the modules of these packages that it imports."""

LAYERS: tuple[tuple[str, ...], ...] = (
    ("bridge.errors",),
    ("bridge.storage",),
    ("bridge.config", "bridge.config_fields", "bridge.parameter_table", "bridge.names", "bridge.finite"),
    ("bridge.containers",),
    ("bridge.conversion",),
    ("bridge.optimizer_state",),
    ("bridge.tokenizers",),
    ("bridge.checkpoint",),
    ("bridge.adapters", "bridge.vocabulary"),
    ("bridge.formats",),
    ("bridge.hub",),
    ("bridge.io",),
    ("bridge.diagnostics", "bridge.evaluation", "bridge.generation"),
    ("bridge.comparison",),
    ("bridge",),
    ("gpt2_torch.arrays", "gpt2_torch.state_dict"),
    ("gpt2_torch.ops",),
    ("gpt2_torch.model",),
    (
        "gpt2_torch.loss",
        "gpt2_torch.loading",
        "gpt2_torch.logits_processors",
        "gpt2_torch.sampling",
        "gpt2_torch.outputs",
    ),
    ("gpt2_torch.classification", "gpt2_torch.generation", "gpt2_torch.evaluation", "gpt2_torch.training"),
    ("gpt2_torch",),
    ("gpt2_jax.choices", "gpt2_jax.lazy_names"),
    ("gpt2_jax.console", "gpt2_jax.reporting"),
    ("gpt2_jax.parallel",),
    ("gpt2_jax.ops",),
    ("gpt2_jax.lora",),
    ("gpt2_jax.model",),
    (
        "gpt2_jax.loss",
        "gpt2_jax.loading",
        "gpt2_jax.logits_processors",
        "gpt2_jax.sampling",
        "gpt2_jax.outputs",
    ),
    ("gpt2_jax.decoding",),
    ("gpt2_jax.classification", "gpt2_jax.generation", "gpt2_jax.evaluation", "gpt2_jax.hardware", "gpt2_jax.nnx"),
    ("gpt2_jax.finetuning",),
    ("gpt2_jax",),
    ("gpt2_jax.data",),
    ("gpt2_jax.training",),
    ("gpt2_jax.parity", "gpt2_jax.plan", "gpt2_jax.bench"),
    ("gpt2_jax.diff", "gpt2_jax.harness", "gpt2_jax.sharing"),
    ("gpt2_jax.cli",),
)
"""From the lowest layer to the highest. A package represents all its modules; the three top packages represent only
their `__init__`. A module may import modules of its own layer and of lower ones."""

MAY_IMPORT_TORCH_SIDE = ("gpt2_jax.parity", "gpt2_jax.bench", "gpt2_jax.cli")
"""The parts of `gpt2_jax` that may import `gpt2_torch`."""


ALLOWED_IN_BRIDGE = frozenset(
    {
        *("numpy", "ml_dtypes", "jaxtyping"),  # arrays and their types
        *("safetensors", "google_crc32c", "tensorstore"),  # files: safetensors, TensorFlow, runs
        *("tiktoken", "tokenizers", "huggingface_hub"),  # imported on first use of a tokenizer or the hub
        "jinja2",  # imported only by the process that renders chat templates
    }
)
"""The packages that `bridge` may import: none of them is a framework."""


def import_graph(root: Path = ROOT, packages: Sequence[str] = PACKAGES) -> Graph:
    """Read the imports of every module below `root`."""
    modules = {_name(path.relative_to(root)): path for package in packages for path in (root / package).rglob("*.py")}
    return {name: frozenset(_imported(path, name, modules)) - {name} for name, path in sorted(modules.items())}


def cycles(graph: Graph) -> list[list[str]]:
    """Return the groups of modules that import each other, directly or through others."""
    reached = {name: _reachable(graph, name) for name in graph}
    groups = {frozenset({other for other in reached[name] if name in reached[other]}) for name in graph}
    return sorted(sorted(group) for group in groups if group)


def upward_imports(graph: Graph, layers: Sequence[Sequence[str]] = LAYERS) -> list[str]:
    """Return one line for each import of a module in a higher layer, and for each module without a layer."""
    order = {name: level for level, names in enumerate(layers) for name in names}
    problems = [f"{name} has no layer" for name in graph if _layer(name, order) is None]
    for name, imported in graph.items():
        for other in sorted(imported):
            own, its = _layer(name, order), _layer(other, order)
            if own is not None and its is not None and its > own:
                problems.append(f"{name} imports {other}, which is above it")
            if name.startswith("gpt2_jax") and other.partition(".")[0] == "gpt2_torch":
                if not name.startswith(MAY_IMPORT_TORCH_SIDE):
                    problems.append(f"{name} imports {other}; only {', '.join(MAY_IMPORT_TORCH_SIDE)} may")
    return problems


def other_packages(root: Path = ROOT, package: str = "bridge") -> set[str]:
    """Return the packages that a package's modules import, without itself and the standard library."""
    imported: set[str] = set()
    for path in (root / package).rglob("*.py"):
        for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add((node.module or "").partition(".")[0])
    return imported - sys.stdlib_module_names - {package}


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(path: Path, name: str, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in _run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, name, path)
            for alias in node.names:
                found = f"{base}.{alias.name}"
                yield from (module for module in ([found] if found in modules else [base]) if module in modules)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "lazy_names":
            yield from (module for module in _lazy_modules(node) if module in modules)


def _lazy_modules(call: ast.Call) -> Iterator[str]:
    """Yield the modules in the table of a `gpt2_jax.lazy_names.lazy_names` call, which imports them on first use."""
    for argument in call.args:
        if isinstance(argument, ast.Dict):
            yield from (str(key.value) for key in argument.keys if isinstance(key, ast.Constant))


def _run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield all nodes except those in the body of `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
            for other in node.orelse:
                yield other
                yield from _run_time_nodes(other)
            continue
        yield node
        yield from _run_time_nodes(node)


def _absolute(node: ast.ImportFrom, name: str, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _reachable(graph: Graph, name: str) -> set[str]:
    found: set[str] = set()
    waiting = [*graph[name]]
    while waiting:
        if (other := waiting.pop()) not in found:
            found.add(other)
            waiting.extend(graph[other])
    return found


def _layer(name: str, order: Mapping[str, int]) -> int | None:
    """Return the layer of the longest prefix. A top package represents only its `__init__`."""
    parts = name.split(".")
    if len(parts) == 1:
        return order.get(name)
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 1, -1))
    return next((order[prefix] for prefix in prefixes if prefix in order), None)


if __name__ == "__main__":
    graph = import_graph()
    problems = [f"a cycle: {', '.join(cycle)}" for cycle in cycles(graph)] + upward_imports(graph)
    print("\n".join(problems) or f"{len(graph)} modules: no cycles, no upward imports")
    sys.exit(bool(problems))
