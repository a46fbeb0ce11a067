"""The implementations of causal attention against `xla`: values, gradients, causality, and errors."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import eight_devices

from gpt2_jax.ops.attention import _splash, attention, fastest

FLOAT64 = 1e-12
"""Relative to the largest value: sums of up to 600 terms in another order."""
FLOAT32 = 1e-5
"""The same in float32: about a hundred units of its rounding."""
STEPS = 4
"""Error against float64 in units of the narrow dtype's rounding, relative to the largest value. The scaled q, the
weights, the gradients of the scores, and the results are each rounded once."""

pytestmark = pytest.mark.usefixtures("quick_compilation")

B, H, K = 2, 4, 6
SCALE = 1 / math.sqrt(K)
LENGTHS = (1, 3, 255, 256, 257, 600)
"""One query, half a block, one less than a block, a block, one more, and three blocks with the last one partial."""

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def implementation(name: Any, scale: float | jax.Array = SCALE, *, segment_ids: jax.Array | None = None) -> Attention:
    return lambda q, k, v: attention(
        q, k, v, None, segment_ids=segment_ids, is_causal=True, scale=scale, implementation=name
    )


def interpreted_splash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Run the TPU's kernel on any machine. It takes scaled queries."""
    return _splash(q / math.sqrt(q.shape[-1]), k, v, segment_ids, interpret=True)


def segments(length: int) -> jax.Array:
    """Return a few segments per row, whose borders are at other places in each row, and padding at the end."""
    return -jnp.sort(-jax.random.randint(jax.random.key(0), (B, length), 0, 6))


def shuffled_segments(length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(0), (B, length), 0, 6)


def heads(length: int, dtype: Any = np.float32, *, seed: int = 0, size: int = K) -> list[jax.Array]:
    """Return queries, keys and values, and a gradient of the result."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=(B, length, H, size)), dtype) for _ in range(4)]


@jax.jit(static_argnums=0)
def value_and_gradients(function: Attention, q: jax.Array, k: jax.Array, v: jax.Array, d: jax.Array) -> Any:
    value, pullback = jax.vjp(function, q, k, v)
    return value, *pullback(d)


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    """Compare value and gradients, each relative to its largest element, or to 1, the size of the inputs.

    With one query and one key, some gradients are zero.
    """
    for i, a, b in zip(range(len(expected)), found, expected, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(
            a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()), err_msg=f"of {len(expected)}, number {i}"
        )


@pytest.mark.parametrize("length", LENGTHS)
def test_blockwise_equals_xla_in_float64(length: int, x64: None) -> None:
    given = heads(length, np.float64)
    found, expected = (value_and_gradients(implementation(name), *given) for name in ("blockwise", "xla"))
    assert_close(found, expected, FLOAT64)


@pytest.mark.parametrize("length", [3, 600])
@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, FLOAT32), (jnp.bfloat16, STEPS * 2**-8)])
def test_blockwise_rounds_only_to_its_dtype(length: int, dtype: Any, tolerance: float, x64: None) -> None:
    given = heads(length, dtype)
    found = value_and_gradients(implementation("blockwise"), *given)
    assert {array.dtype for array in found} == {jnp.dtype(dtype)}
    exact = value_and_gradients(implementation("xla"), *(array.astype(np.float64) for array in given))
    assert_close(found, exact, tolerance)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("length", LENGTHS)
def test_blockwise_equals_xla_with_segments_in_float64(length: int, x64: None) -> None:
    given = heads(length, np.float64)
    for segment_ids in (segments(length), shuffled_segments(length)):
        found, expected = (
            value_and_gradients(implementation(name, segment_ids=segment_ids), *given) for name in ("blockwise", "xla")
        )
        assert_close(found, expected, FLOAT64)


def test_segments_are_a_mask(x64: None) -> None:
    given, segment_ids = heads(9, np.float64), np.array([[1, 1, 1, 4, 4, 2, 0, 0, 0], [3, 0, 3, 5, 3, 5, 5, 0, 5]])
    mask = (segment_ids[:, None, :, None] == segment_ids[:, None, None, :]) & np.tri(9, dtype=bool)
    expected = value_and_gradients(lambda q, k, v: attention(q, k, v, mask, is_causal=False, scale=SCALE), *given)
    for name in ("xla", "blockwise"):
        found = value_and_gradients(implementation(name, segment_ids=jnp.asarray(segment_ids)), *given)
        assert_close(found, expected, FLOAT64)


def test_segments_and_a_mask_hide_keys_together_without_causality(x64: None) -> None:
    q, k, v, _ = heads(9, np.float64)
    segment_ids, mask = segments(9), np.random.default_rng(0).random((B, 1, 9, 9)) < 0.5
    both = mask & np.asarray(segment_ids[:, None, :, None] == segment_ids[:, None, None, :])
    found = attention(q, k, v, mask, segment_ids=segment_ids, is_causal=False, scale=SCALE)
    np.testing.assert_array_equal(found, attention(q, k, v, both, is_causal=False, scale=SCALE))


@pytest.mark.parametrize("name", ["xla", "blockwise"])
def test_a_traced_scale_is_a_number_and_has_a_gradient(name: str, x64: None) -> None:
    q, k, v, d = heads(257, np.float64)

    @jax.jit
    def total(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> jax.Array:
        return (implementation(name, scale)(q, k, v) * d).sum()

    scale = 0.3
    value = value_and_gradients(implementation("xla", scale), q, k, v, d)
    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))(q, k, v, jnp.asarray(scale))
    by_difference = total(q, k, v, scale + 1e-6) - total(q, k, v, scale - 1e-6)
    np.testing.assert_allclose(total(q, k, v, scale), (value[0] * d).sum(), rtol=FLOAT64)
    assert_close(gradients[:3], value[1:], FLOAT64)
    np.testing.assert_allclose(gradients[3], by_difference / 2e-6, rtol=1e-6)  # the error of the finite difference


@pytest.mark.parametrize("length", [3, 600])
def test_scores_of_thousands_do_not_overflow(length: int, x64: None) -> None:
    """The scores of masked keys may exceed those of visible keys by more than the range of the exponential."""
    q, k, v, d = heads(length, np.float64)
    given = 1e3 * q, k, v, d
    found, expected = (value_and_gradients(implementation(name), *given) for name in ("blockwise", "xla"))
    assert np.abs(np.einsum("BTHK,BSHK->BHTS", given[0], k)).max() * SCALE > np.log(np.finfo(np.float64).max)
    # Rounding of the scores becomes relative error of the weights, so it grows with the scores.
    assert_close(found, expected, 1e3 * FLOAT64)
    narrow = value_and_gradients(implementation("blockwise"), *(array.astype(np.float32) for array in given))
    assert all(jnp.isfinite(array).all() for array in narrow)


@pytest.mark.parametrize("larger", [1.0, 1e3])
def test_blockwise_supports_vmap_and_second_derivatives(larger: float, x64: None) -> None:
    """The hand-written gradients support vmap and second derivatives."""
    q, k, v, _ = heads(5, np.float64)

    def slope(function: Attention) -> Any:
        def squares(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return (jax.grad(lambda q: (function(q[None], k[None], v[None]) ** 2).sum())(q) ** 2).sum()

        return jax.jit(jax.vmap(jax.grad(squares, (0, 1, 2))))(larger * q, k, v)

    assert_close(slope(implementation("blockwise")), slope(implementation("xla")), larger * FLOAT64)
    with_segments = (implementation(name, segment_ids=jnp.array([[1, 1, 2, 2, 2]])) for name in ("blockwise", "xla"))
    assert_close(*map(slope, with_segments), larger * FLOAT64)


@pytest.mark.parametrize("length", [128, 256])
def test_the_tpu_kernel_equals_xla(length: int) -> None:
    given = heads(length, size=8)
    found = value_and_gradients(interpreted_splash, *given)
    assert_close(found, value_and_gradients(implementation("xla", 1 / math.sqrt(8)), *given), FLOAT32)


def test_the_tpu_kernel_equals_xla_with_segments() -> None:
    given, segment_ids = heads(256, size=8), segments(256)
    found = value_and_gradients(partial(interpreted_splash, segment_ids=segment_ids), *given)
    expected = value_and_gradients(implementation("xla", 1 / math.sqrt(8), segment_ids=segment_ids), *given)
    assert_close(found, expected, FLOAT32)


@pytest.mark.parametrize(
    ("function", "length", "places"),
    [
        (implementation("xla"), 257, (1, 255)),
        (implementation("blockwise"), 600, (1, 200, 256, 257, 599)),
        (interpreted_splash, 256, (1, 128, 129)),
    ],
    ids=["xla", "blockwise", "splash"],
)
def test_later_keys_and_values_change_nothing(function: Attention, length: int, places: tuple[int, ...]) -> None:
    """Earlier results are equal bit for bit, and their gradients by later keys and values are zero."""
    q, k, v, d = heads(length)
    _, other_k, other_v, _ = heads(length, seed=1)
    before = value_and_gradients(function, q, k, v, d)[0]
    for place in places:
        later = (jnp.arange(length) >= place)[:, None, None]
        changed = q, jnp.where(later, 9 * other_k, k), jnp.where(later, 9 * other_v, v), jnp.where(later, 0, d)
        after, _, dk, dv = value_and_gradients(function, *changed)
        np.testing.assert_array_equal(after[:, :place], before[:, :place])
        assert (after[:, place:] != before[:, place:]).any((2, 3)).all()
        assert not dk[:, place:].any() and not dv[:, place:].any()
        assert dv[:, :place].any((2, 3)).all()


def shapes(program: str) -> set[tuple[int, ...]]:
    """Return the shape of every array in a compiled program."""
    found = re.findall(r"\b(?:pred|[subf]+\d+)\[([\d,]+)\]", program)
    return {tuple(map(int, dimensions.split(","))) for dimensions in found}


def has_all_scores(program: str, length: int) -> bool:
    """Whether an array has as many elements as one head has scores, or an axis of queries and an axis of keys."""
    return any(s.count(length) >= 2 or math.prod(s) >= B * H * length**2 for s in shapes(program))


@pytest.mark.parametrize("segmented", [False, True], ids=["causal", "segments"])
def test_blockwise_never_holds_all_scores(segmented: bool) -> None:
    length = 1024
    abstract = [jax.ShapeDtypeStruct((B, length, H, K), jnp.float32)] * 4
    segment_ids = segments(length) if segmented else None
    programs = {
        name: value_and_gradients.lower(implementation(name, segment_ids=segment_ids), *abstract).compile().as_text()
        for name in ("xla", "blockwise")
    }
    assert {name: has_all_scores(program, length) for name, program in programs.items()} == {
        "xla": True,
        "blockwise": False,
    }


@pytest.mark.thorough
def test_the_tpu_kernel_and_blockwise_compute_the_same_on_a_mesh(tmp_path: Path) -> None:
    """Rows are sharded over two axes and heads over a third, in a process with eight devices, without communication."""
    results = eight_devices.run("spread_attention", tmp_path)
    for name in ("splash", "blockwise", "splash segments", "blockwise segments"):
        found, expected = ([results[f"{where}/{name}/{i}"] for i in range(4)] for where in ("mesh", "plain"))
        assert_close(found, expected, FLOAT32)
        assert results[f"parts/{name}"].tolist() == [1, 128, 2, 8]
        assert results[f"moves/{name}"].tolist() == []


FASTEST = [
    ("cpu", jnp.float32, 1024, 64, "blockwise"),
    ("cpu", jnp.float64, 3, 5, "blockwise"),
    ("cpu", jnp.bfloat16, 1, 64, "blockwise"),
    ("gpu", jnp.bfloat16, 1024, 64, "cudnn"),
    ("gpu", jnp.float16, 1023, 128, "cudnn"),
    ("gpu", jnp.float32, 1024, 64, "xla"),
    ("gpu", jnp.float64, 1024, 64, "xla"),
    ("gpu", jnp.bfloat16, 1024, 60, "xla"),
    ("gpu", jnp.bfloat16, 1024, 136, "xla"),
    ("tpu", jnp.bfloat16, 1024, 64, "splash"),
    ("tpu", jnp.float32, 384, 25, "splash"),
    ("tpu", jnp.bfloat16, 1000, 64, "xla"),
    ("tpu", jnp.bfloat16, 64, 64, "xla"),
    ("tpu", jnp.float16, 1024, 64, "xla"),
    ("tpu", jnp.float64, 1024, 64, "xla"),
    ("METAL", jnp.float32, 1024, 64, "xla"),
]


@pytest.mark.parametrize(("platform", "dtype", "length", "head_size", "name"), FASTEST)
def test_the_fastest_depends_on_platform_dtype_length_and_head_size(
    platform: str, dtype: Any, length: int, head_size: int, name: str
) -> None:
    assert fastest(platform, jnp.dtype(dtype), length, head_size) == name
    assert fastest(platform, dtype, length, head_size) == name


@pytest.mark.parametrize(("platform", "name"), [("cpu", "blockwise"), ("gpu", "xla"), ("tpu", "splash")])
def test_the_fastest_supports_segments(platform: str, name: str) -> None:
    assert fastest(platform, jnp.dtype(jnp.bfloat16), 1024, 64, has_segments=True) == name


def test_auto_takes_the_fastest_and_xla_for_a_mask_or_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = heads(600)
    options: dict[str, Any] = {"is_causal": True, "scale": 1.0}

    def program(mask: jax.Array | None = None, **more: Any) -> str:
        return str(jax.make_jaxpr(lambda: attention(q, k, v, mask, **options | more))())

    assert program() == program(implementation="blockwise") != program(implementation="xla")
    mask, key = jnp.ones((1, 1, 1, 600), bool), jax.random.key(0)
    for more in ({"mask": mask}, {"dropout_rate": 0.1, "dropout_key": key}, {"is_causal": False}):
        assert program(**more) == program(**more, implementation="xla")
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert "pallas_call" not in program()  # 600 is not a multiple of 128
    q, k, v, _ = heads(256)
    assert "pallas_call" in program()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown name": ({"implementation": "flash"}, "'flash' is not one of auto, xla, blockwise, cudnn, splash"),
    "an unknown name with a mask": ({"implementation": "flash", "mask": True}, "'flash' is not one of auto"),
    "cudnn in float32": ({"implementation": "cudnn"}, "'cudnn' takes bfloat16 and float16, not float32"),
    "cudnn's odd head size": (
        {"implementation": "cudnn", "dtype": jnp.bfloat16},
        "'cudnn' takes head sizes that are multiples of 8 up to 128, not 6",
    ),
    "cudnn's large head size": (
        {"implementation": "cudnn", "dtype": jnp.float16, "size": 136},
        "multiples of 8 up to 128, not 136",
    ),
    "splash's length": ({"implementation": "splash", "length": 200}, "multiples of 128, not 200"),
    "splash in float16": (
        {"implementation": "splash", "length": 128, "dtype": jnp.float16},
        "'splash' takes bfloat16 and float32, not float16",
    ),
    "a mask": (
        {"implementation": "blockwise", "mask": True},
        "'blockwise' is for causal attention without a mask or dropout",
    ),
    "dropout": (
        {"implementation": "blockwise", "dropout_rate": 0.1},
        "'blockwise' is for causal attention without a mask",
    ),
    "cudnn with segments": (
        {"implementation": "cudnn", "dtype": jnp.bfloat16, "size": 64, "segment_ids": jnp.ones((B, 7), int)},
        "'cudnn' does not support segment_ids, which packed documents have; use 'auto' or 'xla'",
    ),
    "segments of other keys": (
        {"is_causal": False, "keys": 4, "segment_ids": jnp.ones((B, 7), int)},
        "attention with segment_ids needs as many queries as keys, not 7 and 4",
    ),
    "every key": ({"implementation": "blockwise", "is_causal": False}, "'blockwise' is for causal attention"),
    "other keys than queries": ({"implementation": "xla", "keys": 4}, "as many queries as keys, not 7 and 4"),
    "other keys than queries for auto": ({"keys": 4}, "as many queries as keys, not 7 and 4"),
}


@pytest.mark.parametrize(("given", "message"), REFUSED.values(), ids=REFUSED)
def test_unsupported_arguments_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    options = {"is_causal": True, "scale": 1.0, **given}
    length, dtype, size = options.pop("length", 7), options.pop("dtype", jnp.float32), options.pop("size", K)
    q, k, v, _ = heads(length, dtype, size=size)
    keys = options.pop("keys", length)
    mask = jnp.ones((1, 1, 1, keys), bool) if options.pop("mask", False) else None
    with pytest.raises(ValueError, match=message):
        attention(q, k[:, :keys], v[:, :keys], mask, **options)


def test_float64_is_refused_by_the_tpu_kernel(x64: None) -> None:
    q, k, v, _ = heads(128, np.float64)
    with pytest.raises(ValueError, match="'splash' takes bfloat16 and float32, not float64"):
        implementation("splash")(q, k, v)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 255, 256, 1024])
@pytest.mark.parametrize(("dtype", "rounding"), [(jnp.bfloat16, 2**-8), (jnp.float16, 2**-11)])
def test_cudnn_equals_xla(length: int, dtype: Any, rounding: float) -> None:
    if jax.default_backend() != "gpu":
        pytest.skip(f"cuDNN needs a GPU; JAX has {jax.default_backend()}")
    given = heads(length, dtype, size=64)
    with jax.default_matmul_precision("highest"):  # otherwise a GPU multiplies float32 as TensorFloat-32
        wide = value_and_gradients(implementation("xla", 1 / 8), *(array.astype(jnp.float32) for array in given))
    found = value_and_gradients(implementation("cudnn", 1 / 8), *given)
    assert {array.dtype for array in found} == {jnp.dtype(dtype)}
    assert_close(found, wide, STEPS * rounding)


@pytest.mark.tpu
def test_the_tpu_kernel_compiles_for_a_mesh_of_tpus(tmp_path: Path) -> None:
    """Compiled by the TPU's compiler, which needs no TPU. The program has the kernels and no array of all scores."""
    if find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: `make test-tpu` installs it")
    length = 1024
    quiet = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    environment = {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    kinds = ("splash", 3, False), ("segments", 3, False), ("dots", 3, False), ("full", 4, False), ("xla", 0, True)
    for name, kernels, scores in kinds:
        command = [sys.executable, str(Path(__file__).with_name("for_tpu.py")), name, str(length), tmp_path / name]
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert child.returncode == 0, child.stderr
        program = (tmp_path / name).read_text()
        assert program.count('custom_call_target="tpu_custom_call"') == kernels, name
        assert any(s.count(length) >= 2 for s in shapes(program)) == scores, name
