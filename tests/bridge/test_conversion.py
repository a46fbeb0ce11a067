"""Conversion between PyTorch names and the Flax tree: exact, without copies, and complete."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from support.models import TINY, random_state

import bridge
from bridge import Checkpoint, ConversionError, GPT2Config
from bridge.storage.trees import flatten, insert

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]
UNTIED = replace(TINY, tie_word_embeddings=False)
NO_BIAS = replace(TINY, bias=False)
State = dict[str, np.ndarray]


def bits(array: np.ndarray) -> np.ndarray:
    """Return the bytes of the array. Comparing numbers would make NaN differ from itself, and -0.0 equal 0.0."""
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def assert_same_tensors(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert np.array_equal(bits(found[name]), bits(array)), name


def with_special_values(state: State) -> State:
    """Return tensors that start with three different NaNs, both zeros, an infinity and a subnormal."""
    for array in state.values():
        size = array.dtype.itemsize
        one = int(np.ones(1, array.dtype).view(f"u{size}")[0])
        infinity = int(np.full(1, np.inf, array.dtype).view(f"u{size}")[0])
        sign = 1 << (8 * size - 1)
        odd = [infinity + 1, infinity + 5, sign + infinity + 3, 0, sign, infinity, 1, one]
        array.reshape(-1)[: len(odd)].view(f"u{size}")[:] = odd
    return state


def spelled(problems: pytest.ExceptionInfo[ConversionError]) -> list[str]:
    """Return the lines of the list in an error."""
    return [line.removeprefix("  - ") for line in str(problems.value).splitlines()[1:]]


# Round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("stacked", [False, True], ids=["per-layer", "stacked"])
@pytest.mark.parametrize("vocab_multiple", [1, 64, 128])
@pytest.mark.parametrize("config", [TINY, UNTIED, NO_BIAS], ids=["tied", "untied", "no-bias"])
def test_the_round_trip_keeps_every_bit(dtype: type, stacked: bool, vocab_multiple: int, config: GPT2Config) -> None:
    state = with_special_values(random_state(config, dtype))
    tree = bridge.to_flax(state, config, stacked=stacked, vocab_multiple=vocab_multiple)
    assert_same_tensors(bridge.to_torch(tree, config, vocab_multiple=vocab_multiple), state)


def test_the_special_values_are_present() -> None:
    values = with_special_values(random_state(TINY, np.float32))["wte.weight"].reshape(-1)
    assert np.isnan(values[:3]).all() and len({*values[:3].view(np.uint32)}) == 3
    assert np.signbit(values[4]) and values[4] == 0 and np.isinf(values[5]) and 0 < values[6] < 1e-40


def test_the_tree_has_the_paths_and_shapes_of_the_table() -> None:
    tree = bridge.to_flax(random_state(UNTIED), UNTIED)
    expected = {"/".join(p.flax_path): p.flax_shape for p in bridge.parameters(UNTIED)}
    assert {path: leaf.shape for path, leaf in flatten(tree).items()} == expected


def test_the_stacked_tree_has_one_h_with_a_leading_layer_axis() -> None:
    state = random_state(TINY)
    tree = bridge.to_flax(state, TINY, stacked=True)
    assert set(tree) == {"wte", "wpe", "h", "ln_f"}
    assert tree["h"]["attn"]["c_attn"]["kernel"].shape == (5, 48, 3, 3, 16)
    for i in range(TINY.n_layer):
        assert np.array_equal(tree["h"]["mlp"]["c_proj"]["kernel"][i], state[f"h.{i}.mlp.c_proj.weight"])


def test_the_query_key_and_value_of_a_head_are_where_attention_looks_for_them() -> None:
    config = replace(TINY, n_head=4)  # three heads could be confused with query, key and value
    state = random_state(config)
    layer = bridge.to_flax(state, config)["h_2"]["attn"]
    value_of_head_1 = slice(2 * 48 + 1 * 12, 2 * 48 + 2 * 12)
    assert np.array_equal(layer["c_attn"]["kernel"][:, 2, 1], state["h.2.attn.c_attn.weight"][:, value_of_head_1])
    assert np.array_equal(layer["c_attn"]["bias"][2, 1], state["h.2.attn.c_attn.bias"][value_of_head_1])
    assert np.array_equal(layer["c_proj"]["kernel"][1], state["h.2.attn.c_proj.weight"][12:24])


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(("multiple", "rows"), [(1, 257), (64, 320), (128, 384)])
def test_the_padding_is_rows_of_zeros_after_the_vocabulary(config: GPT2Config, multiple: int, rows: int) -> None:
    state = random_state(config)
    tree = bridge.to_flax(state, config, vocab_multiple=multiple)
    for name in ("wte", "lm_head")[: 1 if config.tie_word_embeddings else 2]:
        embedding = tree[name]["embedding"]
        assert embedding.shape == (rows, 48)
        assert np.array_equal(embedding[:257], state[f"{name}.weight"])
        assert not embedding[257:].any()
    assert tree["wpe"]["embedding"].shape == (40, 48)


def test_leaves_are_views_unless_stacked_or_padded() -> None:
    state = random_state(UNTIED)
    leaves = flatten(bridge.to_flax(state, UNTIED))
    back = bridge.to_torch(unflatten_dict(leaves, sep="/"), UNTIED)
    for p in bridge.parameters(UNTIED):
        assert np.shares_memory(leaves["/".join(p.flax_path)], state[p.torch_name]), p.torch_name
        assert np.shares_memory(back[p.torch_name], state[p.torch_name]), p.torch_name


def test_stacked_leaves_are_unstacked_as_views() -> None:
    tree = bridge.to_flax(random_state(TINY), TINY, stacked=True, vocab_multiple=64)
    back = bridge.to_torch(tree, TINY, vocab_multiple=64)
    assert np.shares_memory(back["h.4.mlp.c_fc.weight"], tree["h"]["mlp"]["c_fc"]["kernel"])
    assert np.shares_memory(back["wte.weight"], tree["wte"]["embedding"])


def test_stacked_and_padded_arrays_are_aligned_for_jax() -> None:
    tree = bridge.to_flax(random_state(TINY, ml_dtypes.bfloat16), TINY, stacked=True, vocab_multiple=64)
    allocated = [*flatten(tree["h"]).values(), tree["wte"]["embedding"]]
    assert all(leaf.ctypes.data % 64 == 0 for leaf in allocated)


def test_the_arguments_are_not_changed() -> None:
    state = random_state(TINY)
    untouched = {name: array.copy() for name, array in state.items()}
    tree = bridge.to_flax(state, TINY, stacked=True)
    names = set(flatten(tree))
    bridge.to_torch(tree, TINY)
    bridge.unstack_layers(tree)
    assert set(flatten(tree)) == names
    assert_same_tensors(state, untouched)


def test_jax_arrays_are_accepted() -> None:
    jax = pytest.importorskip("jax")
    state = random_state(TINY, ml_dtypes.bfloat16)
    for stacked in (False, True):
        tree = jax.tree.map(jax.numpy.asarray, bridge.to_flax(state, TINY, stacked=stacked))
        assert_same_tensors(bridge.to_torch(tree, TINY), state)


# Flat attention projections, as other Flax GPT-2s have them


def with_flat_projections(tree: Mapping[str, Any], only: str = "") -> dict[str, Any]:
    """Return a tree whose projections of attention have PyTorch's shapes, or only those whose path contains `only`."""
    flat: dict[str, Any] = {}
    shapes = {"/".join(p.flax_path): p.torch_shape for p in bridge.parameters(UNTIED)}
    for path, leaf in flatten(tree).items():
        insert(flat, path.split("/"), leaf.reshape(shapes[path]) if only in path else leaf)
    return flat


@pytest.mark.parametrize("only", ["", "c_attn/kernel", "c_attn/bias", "attn/c_proj", "h_3/"])
@pytest.mark.parametrize("stacked", [False, True])
def test_flat_projections_are_taken_too(stacked: bool, only: str) -> None:
    state = random_state(UNTIED)
    tree = with_flat_projections(bridge.to_flax(state, UNTIED), only)
    if stacked and only != "h_3/":
        tree = bridge.stack_layers(tree)
    assert_same_tensors(bridge.to_torch(tree, UNTIED), state)


def test_a_flat_projection_is_a_view() -> None:
    tree = with_flat_projections(bridge.to_flax(random_state(TINY), TINY))
    back = bridge.to_torch(tree, TINY)
    assert np.shares_memory(back["h.4.attn.c_attn.weight"], tree["h_4"]["attn"]["c_attn"]["kernel"])


WRONG_FLAT_SHAPES = {
    "c_attn/kernel": [(144, 48), (48, 145), (48, 48), (47, 144)],
    "c_attn/bias": [(143,), (48,), (145,)],
    "c_proj/kernel": [(48, 49), (49, 48), (16, 48)],
}


@pytest.mark.parametrize(
    ("path", "shape"), [(path, shape) for path, shapes in WRONG_FLAT_SHAPES.items() for shape in shapes], ids=str
)
def test_flat_projections_of_the_wrong_shape_are_refused_by_name(path: str, shape: tuple[int, ...]) -> None:
    tree = with_flat_projections(bridge.to_flax(random_state(TINY), TINY))
    insert(tree, ["h_2", "attn", *path.split("/")], np.ones(shape, np.float32))
    required = {"c_attn/kernel": (48, 144), "c_attn/bias": (144,), "c_proj/kernel": (48, 48)}[path]
    with pytest.raises(ConversionError) as caught:
        bridge.to_torch(tree, TINY)
    [line] = spelled(caught)
    assert line.startswith(f"h_2/attn/{path} has shape {shape}; the configuration requires {required}")
    assert ("it is transposed" in line) == (shape == required[::-1] and shape != required)


# Names


@pytest.mark.parametrize(
    "prefix",
    [
        *("", "transformer.", "module.", "_orig_mod.", "module.transformer.", "module._orig_mod.transformer."),
        *("_orig_mod.module._orig_mod.module.", "transformer.module._orig_mod."),
        *("model.", "model.transformer.", "pretrained_model.transformer.", "_module.transformer."),
        *("base_model.model.transformer.", "_fsdp_wrapped_module.transformer.", "_forward_module.module.transformer."),
        *("module._orig_mod.model.transformer.", "pretrained_model.base_model.model.transformer.", "model.model."),
    ],
)
def test_prefixes_of_wrappers_are_removed(prefix: str) -> None:
    state = random_state(UNTIED)
    wrapped = {prefix + name: array for name, array in state.items()}
    assert_same_tensors(bridge.canonicalize(wrapped, UNTIED), state)


def test_wrappers_inside_a_name_are_removed() -> None:
    names = ["transformer.h.0._orig_mod.attn.module.c_attn.weight", "lm_head._orig_mod.weight"]
    assert bridge.canonical_names(names) == {"h.0.attn.c_attn.weight": names[0], "lm_head.weight": names[1]}


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.model.", "pretrained_model.transformer."])
def test_prefixed_beside_unprefixed_names_are_an_error_that_names_both(prefix: str) -> None:
    state = random_state(UNTIED)
    mixed = {(name if name == "lm_head.weight" else prefix + name): array for name, array in state.items()}
    with pytest.raises(ConversionError, match="different prefixes; save the state_dict of one model") as caught:
        bridge.to_flax(mixed, UNTIED)
    shown = prefix.removesuffix("transformer.")
    assert spelled(caught) == [f"'{prefix}wte.weight' has '{shown}'", "'lm_head.weight' has no prefix"]


def test_two_different_prefixes_are_an_error_that_names_both() -> None:
    with pytest.raises(ConversionError) as caught:
        bridge.canonical_names(["module.h.0.ln_1.weight", "model.ln_f.weight"])
    assert spelled(caught) == ["'module.h.0.ln_1.weight' has 'module.'", "'model.ln_f.weight' has 'model.'"]


@pytest.mark.parametrize("prefix", ["net.", "net.transformer.", "model.gpt.", "a\x1b[2J."])
def test_an_unknown_prefix_is_named(prefix: str) -> None:
    state = {prefix + name: array for name, array in random_state(TINY).items()}
    with pytest.raises(ConversionError) as caught:
        bridge.canonicalize(state, TINY)
    shown = prefix.replace("\x1b", "\\x1b")
    assert spelled(caught)[0] == (
        f"names have the prefix '{shown}', which no known wrapper adds; remove it from the names"
    )


def test_a_tensor_of_another_head_has_no_part_in_the_prefix() -> None:
    """TRL's models have a value head beside `pretrained_model`."""
    names = ["pretrained_model.transformer.wte.weight", "v_head.summary.weight"]
    assert bridge.canonical_names(names) == {"wte.weight": names[0], "v_head.summary.weight": names[1]}


def test_mask_buffers_are_dropped_and_biases_are_kept() -> None:
    state = random_state(TINY)
    buffers = {f"h.{i}.attn.{name}": np.ones((1, 1, 4, 4), bool) for i in range(5) for name in ("bias", "masked_bias")}
    assert_same_tensors(bridge.canonicalize({**buffers, **state}, TINY), state)
    prefixed = {f"transformer.{name}": array for name, array in {**state, **buffers}.items()}
    assert_same_tensors(bridge.canonicalize(prefixed, TINY), state)


def test_one_tensor_under_two_prefixes_is_an_error_that_names_both() -> None:
    state = random_state(TINY)
    state["module.transformer.wpe.weight"] = state["wpe.weight"]
    state["_orig_mod.h.1.ln_1.bias"] = state["h.1.ln_1.bias"]
    with pytest.raises(ConversionError) as caught:
        bridge.to_flax(state, TINY)
    assert spelled(caught) == [
        "'wpe.weight' is the canonical name of 2 tensors: 'wpe.weight', 'module.transformer.wpe.weight'",
        "'h.1.ln_1.bias' is the canonical name of 2 tensors: 'h.1.ln_1.bias', '_orig_mod.h.1.ln_1.bias'",
    ]


@pytest.mark.parametrize(
    "name", ["", "module", "_orig_mod", "model", "transformer", "module._orig_mod.transformer", "model.", "..."]
)
def test_a_name_that_is_only_a_prefix_is_an_extra_tensor(name: str) -> None:
    with pytest.raises(ConversionError, match="is not a parameter of this model"):
        bridge.to_flax({**random_state(TINY), name: np.zeros(3, np.float32)}, TINY)


def test_canonical_order_is_that_of_the_table() -> None:
    state = random_state(TINY)
    shuffled = {name: state[name] for name in sorted(state, reverse=True)}
    assert list(bridge.canonicalize(shuffled, TINY)) == [p.torch_name for p in bridge.parameters(TINY)]


# Totality


def test_all_problems_are_listed_in_one_error() -> None:
    state = random_state(TINY)
    del state["h.3.ln_2.bias"], state["ln_f.weight"]
    state["h.5.ln_1.weight"] = np.ones(48, np.float32)
    state["score.weight"] = np.ones((2, 48), np.float32)
    state["h.0.mlp.c_fc.weight"] = state["h.0.mlp.c_fc.weight"].T
    state["wpe.weight"] = state["wpe.weight"].astype(np.int32)
    state["lm_head.weight"] = state["wte.weight"] + 1
    with pytest.raises(ConversionError) as caught:
        bridge.to_flax(state, TINY)
    lines = spelled(caught)
    assert len(lines) == 7
    for start in (
        "lm_head.weight differs from wte.weight",
        "h.3.ln_2.bias is missing (shape (48,))",
        "ln_f.weight is missing",
        "h.0.mlp.c_fc.weight has shape (100, 48); the configuration requires (48, 100)",
        "'h.5.ln_1.weight' is not a parameter",
        "'score.weight' is not a parameter",
        "'wpe.weight' holds int32",
    ):
        assert any(line.startswith(start) for line in lines), start


def test_all_problems_of_a_tree_are_listed_in_one_error() -> None:
    tree = bridge.to_flax(random_state(TINY), TINY)
    del tree["h_3"]["ln_2"]
    tree["h_9"] = {"ln_1": {"scale": np.ones(48, np.float32)}}
    tree["h_0"]["attn"]["c_attn"]["kernel"] = np.ones((48, 3, 48), np.float32)
    tree["wpe"]["embedding"] = np.ones((40, 48), np.int8)
    with pytest.raises(ConversionError) as caught:
        bridge.to_torch(tree, TINY)
    assert spelled(caught) == [
        "h_3/ln_2/scale is missing (shape (48,))",
        "h_3/ln_2/bias is missing (shape (48,))",
        "h_0/attn/c_attn/kernel has shape (48, 3, 48); the configuration requires (48, 3, 3, 16)",
        "'h_9/ln_1/scale' is not a parameter of this model",
        "'wpe/embedding' holds int8; weights must be one of float32, float16, bfloat16, float64",
    ]


def test_hundreds_of_problems_are_counted_but_not_all_listed() -> None:
    with pytest.raises(ConversionError, match=r"\.\.\. and 24 more") as caught:
        bridge.to_flax({}, TINY)
    assert len(spelled(caught)) == 41


@pytest.mark.parametrize(
    "dtype",
    [np.int32, np.int8, np.uint8, np.bool_, np.complex64, np.complex128, ml_dtypes.float8_e4m3fn, ">f4", object],
)
@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
def test_weights_that_are_not_floats_are_refused(dtype: Any, config: GPT2Config) -> None:
    state = random_state(UNTIED)
    state["lm_head.weight"] = state["wte.weight"]
    for name in ("wte.weight", "lm_head.weight", "h.1.ln_1.bias"):
        state[name] = np.zeros(state[name].shape, dtype)
    with pytest.raises(ConversionError, match=r"'h\.1\.ln_1\.bias' holds ") as caught:
        bridge.to_flax(state, config)
    assert "'wte.weight' holds" in str(caught.value)


def test_control_characters_of_a_name_are_escaped() -> None:
    with pytest.raises(ConversionError) as caught:
        bridge.canonicalize({**random_state(TINY), "wte\x1b[2J\nfine": np.zeros(1, np.float32)}, TINY)
    assert "'wte\\x1b[2J\\nfine'" in str(caught.value)


# The head


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_a_tied_head_that_equals_the_embedding_is_dropped(dtype: type) -> None:
    state = with_special_values(random_state(TINY, dtype))
    assert_same_tensors(bridge.canonicalize({**state, "lm_head.weight": state["wte.weight"].copy()}, TINY), state)


@pytest.mark.parametrize("row", [0, 256])
def test_a_tied_head_that_differs_in_one_bit_is_an_error(row: int) -> None:
    state = random_state(TINY)
    state["wte.weight"][row, -1] = 0.0
    state["lm_head.weight"] = state["wte.weight"].copy()
    state["lm_head.weight"][row, -1] = -0.0
    with pytest.raises(ConversionError, match="tie_word_embeddings"):
        bridge.to_flax(state, TINY)


@pytest.mark.parametrize("head", [np.ones((256, 48), np.float32), np.ones((257, 48), np.float16)], ids=str)
def test_a_tied_head_of_another_shape_or_dtype_is_an_error(head: np.ndarray) -> None:
    state = random_state(TINY)
    state["wte.weight"][:] = 1
    with pytest.raises(ConversionError, match=r"lm_head\.weight differs"):
        bridge.to_flax({**state, "lm_head.weight": head}, TINY)


def test_an_untied_head_must_be_stored() -> None:
    with pytest.raises(ConversionError, match=r"lm_head\.weight is missing \(shape \(257, 48\)\)"):
        bridge.to_flax(random_state(TINY), UNTIED)


def test_an_untied_head_that_equals_the_embedding_is_kept() -> None:
    state = random_state(TINY)
    state["lm_head.weight"] = state["wte.weight"].copy()
    assert "lm_head" in bridge.to_flax(state, UNTIED)


def test_biases_of_a_model_without_them_are_extra_tensors() -> None:
    with pytest.raises(ConversionError, match=r"'h.0.ln_1.bias' is not a parameter"):
        bridge.to_flax(random_state(TINY), NO_BIAS)


# Stacking


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_stacking_and_unstacking_are_inverse(dtype: type) -> None:
    state = with_special_values(random_state(UNTIED, dtype))
    per_layer, stacked = (bridge.to_flax(state, UNTIED, stacked=form) for form in (False, True))
    assert_same_tensors(flatten(sort(bridge.stack_layers(per_layer))), flatten(sort(stacked)))
    assert_same_tensors(flatten(sort(bridge.unstack_layers(stacked))), flatten(sort(per_layer)))


def sort(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: sort(tree[name]) if isinstance(tree[name], Mapping) else tree[name] for name in sorted(tree)}


def test_ten_layers_are_stacked_in_the_order_of_their_numbers() -> None:
    config = replace(TINY, n_layer=12)
    tree = bridge.to_flax(random_state(config), config)
    shuffled = {name: tree[name] for name in sorted(tree)}  # h_0, h_1, h_10, h_11, h_2 ...
    stacked = bridge.stack_layers(shuffled)["h"]["ln_1"]["scale"]
    assert all(np.array_equal(stacked[i], tree[f"h_{i}"]["ln_1"]["scale"]) for i in range(12))


def test_layers_of_different_dtypes_are_not_stacked() -> None:
    state = random_state(TINY)
    state["h.2.mlp.c_fc.bias"] = state["h.2.mlp.c_fc.bias"].astype(np.float16)
    with pytest.raises(ConversionError, match=r"h\.2\.mlp\.c_fc\.bias holds float16"):
        bridge.to_flax(state, TINY, stacked=True)
    with pytest.raises(ConversionError, match="h_2/mlp/c_fc/bias does not have the shape and dtype"):
        bridge.stack_layers(bridge.to_flax(state, TINY))


def test_different_dtypes_within_a_layer_are_stacked_and_kept() -> None:
    state = random_state(TINY, ml_dtypes.bfloat16)
    for name in [name for name in state if ".ln_" in name]:
        state[name] = state[name].astype(np.float32)
    tree = bridge.to_flax(state, TINY, stacked=True)
    assert tree["h"]["ln_1"]["scale"].dtype == np.float32
    assert tree["h"]["mlp"]["c_fc"]["bias"].dtype == ml_dtypes.bfloat16
    assert_same_tensors(bridge.to_torch(tree, TINY), state)


def test_different_layers_are_not_stacked_and_all_are_named() -> None:
    tree = bridge.to_flax(random_state(TINY), TINY)
    del tree["h_0"]["ln_1"]["bias"], tree["h_3"]["ln_2"]["bias"]
    tree["h_4"]["mlp"]["c_fc"]["bias"] = np.ones(7, np.float32)
    with pytest.raises(ConversionError) as caught:
        bridge.stack_layers(tree)
    named = {line.split(" ")[0] for line in spelled(caught)}
    assert named == {*(f"h_{i}/ln_1/bias" for i in (1, 2, 3, 4)), "h_3/ln_2/bias", "h_4/mlp/c_fc/bias"}


@pytest.mark.parametrize("missing", ["h_0", "h_2"])
def test_layers_with_a_gap_are_not_stacked(missing: str) -> None:
    tree = bridge.to_flax(random_state(TINY), TINY)
    del tree[missing]
    with pytest.raises(ConversionError, match="without gaps"):
        bridge.stack_layers(tree)


def test_a_tree_without_layers_is_not_stacked() -> None:
    with pytest.raises(ConversionError, match="without gaps"):
        bridge.stack_layers({"wte": {}})


def test_a_tree_with_a_stack_and_single_layers_is_refused() -> None:
    state = random_state(TINY)
    both = {**bridge.to_flax(state, TINY), **bridge.to_flax(state, TINY, stacked=True)}
    for take in (bridge.unstack_layers, lambda tree: bridge.to_torch(tree, TINY)):
        with pytest.raises(ConversionError, match="one h without h_0"):
            take(both)


def test_a_tree_without_a_stack_is_not_unstacked() -> None:
    with pytest.raises(ConversionError, match="one h without h_0"):
        bridge.unstack_layers(bridge.to_flax(random_state(TINY), TINY))


def test_a_stack_of_another_number_of_layers_is_refused() -> None:
    tree = bridge.to_flax(random_state(TINY), TINY, stacked=True)
    with pytest.raises(ConversionError, match="h_5/ln_1/scale is missing"):
        bridge.to_torch(tree, replace(TINY, n_layer=6))
    with pytest.raises(ConversionError, match="'h_4/ln_1/scale' is not a parameter"):
        bridge.to_torch(tree, replace(TINY, n_layer=4))


# Misuse


@pytest.mark.parametrize("stacked", [False, True])
def test_a_tree_in_place_of_a_state_dict_gets_the_helpful_message(stacked: bool) -> None:
    tree = bridge.to_flax(random_state(TINY), TINY, stacked=stacked)
    for given in (tree, {"params": tree}):
        for take in (Checkpoint.of, bridge.to_flax, bridge.canonicalize):
            with pytest.raises(ConversionError, match=r"' is a dictionary, .* with bridge\.to_torch\(params, config\)"):
                take(given, TINY)


@pytest.mark.parametrize("stacked", [False, True])
def test_variables_in_place_of_params_get_the_helpful_message(stacked: bool) -> None:
    variables = {"params": bridge.to_flax(random_state(TINY), TINY, stacked=stacked)}
    with pytest.raises(ConversionError, match=r'variables\["params"\], not variables'):
        bridge.to_torch(variables, TINY)


def test_the_wrong_padding_multiple_is_refused() -> None:
    tree = bridge.to_flax(random_state(TINY), TINY, vocab_multiple=64)
    with pytest.raises(
        ConversionError, match=r"wte/embedding has shape \(320, 48\); the configuration requires \(257, 48\)"
    ):
        bridge.to_torch(tree, TINY)


def test_a_checkpoint_of_arrays_is_checked_and_canonical() -> None:
    state = random_state(TINY)
    checkpoint = Checkpoint.of({f"module.{name}": array for name, array in state.items()}, TINY)
    assert checkpoint.format == "memory"
    assert_same_tensors(checkpoint.tensors, state)
    with pytest.raises(ConversionError):
        Checkpoint.of({}, TINY)


def test_arrays_of_a_checkpoint_are_read_only() -> None:
    state = random_state(TINY)
    with pytest.raises(ValueError, match="read-only"):
        Checkpoint.of(state, TINY).tensors["wte.weight"][0, 0] = 1.0
    state["wte.weight"][0, 0] = 1.0  # the caller's array is unchanged


def test_a_membership_test_reads_no_tensor() -> None:
    def read() -> np.ndarray:
        raise AssertionError("was read")

    tensors = bridge.storage.tensors.LazyTensorMap(
        {"wte.weight": bridge.storage.tensors.LazyTensor(np.dtype("f4"), (2, 3), read)}
    )
    assert "wte.weight" in tensors and "wpe.weight" not in tensors
    assert len(tensors) == 1 and list(tensors) == ["wte.weight"]
    assert repr(tensors) == "<1 tensors, 24 bytes, read on demand>"


def test_torch_tensors_that_are_not_arrays_are_refused_with_a_remedy() -> None:
    import torch

    state = {name: torch.from_numpy(array) for name, array in random_state(TINY).items()}
    assert np.array_equal(bridge.to_flax(state, TINY)["wte"]["embedding"], state["wte.weight"])
    with pytest.raises(ConversionError, match="checkpoint_from_model"):
        bridge.to_flax({name: tensor.bfloat16() for name, tensor in state.items()}, TINY)
