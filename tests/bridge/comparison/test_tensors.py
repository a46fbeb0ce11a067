"""The comparison of two models by tensor: rows, transposes, permuted heads, copied layers, tied and missing tensors."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from support.models import SMALLEST, random_checkpoint, random_state

import bridge
from bridge import Checkpoint, GPT2Config
from bridge.comparison.symmetries import Permutation
from bridge.comparison.tensors import TensorComparison, TensorsComparison, compare_entries, compare_models
from bridge.storage.tensors import LazyTensor, LazyTensorMap

CONFIG = replace(SMALLEST, n_head=4, n_layer=3)
UNTIED = replace(CONFIG, tie_word_embeddings=False)
ORDER = (2, 0, 3, 1)

State = dict[str, np.ndarray]


def compared(state: State, config: GPT2Config = CONFIG, original: Checkpoint | None = None) -> TensorsComparison:
    """Compare the random model with another state."""
    return compare_models(original or random_checkpoint(CONFIG), Checkpoint.of(state, config))


def unequal(found: TensorsComparison) -> dict[str, str]:
    return {tensor.name: tensor.status for tensor in found.tensors if tensor.status != "identical"}


def by_name(found: TensorsComparison, name: str) -> TensorComparison:
    [tensor] = [tensor for tensor in found.tensors if tensor.name == name]
    return tensor


def permuted_heads(state: State, layer: int = 1, names: tuple[str, ...] = ("c_attn", "c_proj")) -> State:
    """Return the state with head `ORDER[k]` at the place of head k."""
    state, order, prefix = dict(state), np.argsort(ORDER), f"h.{layer}.attn."
    H, K, D = CONFIG.n_head, CONFIG.head_size, CONFIG.n_embd
    if "c_attn" in names:
        state[prefix + "c_attn.weight"] = (
            state[prefix + "c_attn.weight"].reshape(D, 3, H, K)[:, :, order].reshape(D, 3 * D)
        )
        state[prefix + "c_attn.bias"] = state[prefix + "c_attn.bias"].reshape(3, H, K)[:, order].reshape(3 * D)
    if "c_proj" in names:
        state[prefix + "c_proj.weight"] = state[prefix + "c_proj.weight"].reshape(H, K, D)[order].reshape(D, D)
    return state


def test_a_model_is_identical_to_itself() -> None:
    found = compared(random_state(CONFIG))
    assert found.is_identical and found.is_same_function
    assert [tensor.name for tensor in found.tensors] == [p.torch_name for p in bridge.parameters(CONFIG)]


def test_changed_rows_of_the_embedding_are_ranges() -> None:
    state = random_state(CONFIG)
    for row in (0, 3, 4, 5, 10):
        state["wte.weight"][row, row % 8] += 1
    tensor = by_name(compared(state), "wte.weight")
    assert (tensor.status, tensor.rows, tensor.different_rows) == ("different", ((0, 1), (3, 6), (10, 11)), 5)
    assert tensor.values.different == 5 and tensor.values.largest == pytest.approx(1)


@pytest.mark.parametrize("rows", [9, 14])
def test_a_resized_vocabulary_is_compared_over_the_common_rows(rows: int) -> None:
    original = random_checkpoint(UNTIED)
    found = compare_models(original, bridge.resize_vocabulary(original, rows))
    assert unequal(found) == {"wte.weight": "different", "lm_head.weight": "different"}
    tensor = by_name(found, "wte.weight")
    common = min(rows, CONFIG.vocab_size)
    assert f"has {abs(rows - CONFIG.vocab_size)} more rows; the {common} common rows are identical" in tensor.note
    assert tensor.values.relative_l2 == 0 and not found.is_same_function


def test_a_transposed_square_matrix_is_named() -> None:
    state = random_state(CONFIG)
    state["h.1.attn.c_proj.weight"] = state["h.1.attn.c_proj.weight"].T
    found = compared(state)
    assert unequal(found) == {"h.1.attn.c_proj.weight": "transposed"}
    assert not found.is_same_function


def test_a_transposed_matrix_that_is_not_square_is_named() -> None:
    a = np.arange(6, dtype=np.float32).reshape(2, 3)
    [found] = compare_entries({"x": LazyTensor.of(a)}, {"x": LazyTensor.of(a.T)})
    assert (found.status, found.shapes) == ("transposed", ((2, 3), (3, 2)))
    [other] = compare_entries({"x": LazyTensor.of(a)}, {"x": LazyTensor.of(a.T + 1)})
    assert (other.status, other.note) == ("different", "the shapes differ")


def test_permuted_heads_are_the_same_function() -> None:
    found = compared(permuted_heads(random_state(CONFIG)))
    names = tuple(f"h.1.attn.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight"))
    assert unequal(found) == dict.fromkeys(names, "permuted")
    assert found.permutations == (Permutation(1, "heads", ORDER, names, True),)
    assert found.is_same_function and not found.is_identical
    assert by_name(found, names[0]).values.relative_l2 > 0.1


def test_permuted_heads_are_found_with_equal_biases() -> None:
    """Zero biases alone would allow every order."""
    state = random_state(CONFIG)
    state["h.1.attn.c_attn.bias"][:] = 0
    found = compared(permuted_heads(state), original=Checkpoint.of(state, CONFIG))
    assert [permutation.order for permutation in found.permutations] == [ORDER]
    assert found.is_same_function


@pytest.mark.parametrize("name", ["c_attn", "c_proj"])
def test_heads_that_are_permuted_in_one_projection_alone_are_another_function(name: str) -> None:
    found = compared(permuted_heads(random_state(CONFIG), names=(name,)))
    assert {permutation.order for permutation in found.permutations} == {ORDER}
    assert not any(permutation.is_same_function for permutation in found.permutations)
    assert not found.is_same_function


def test_heads_permuted_differently_in_the_projections_are_another_function() -> None:
    state = permuted_heads(permuted_heads(random_state(CONFIG)), names=("c_proj",))
    assert not compared(state).is_same_function


def test_permuted_feed_forward_units_are_the_same_function() -> None:
    state, order = random_state(CONFIG), np.random.default_rng(1).permutation(CONFIG.feed_forward_size)
    for name, axis in (("c_fc.weight", 1), ("c_fc.bias", 0), ("c_proj.weight", 0)):
        state[f"h.2.mlp.{name}"] = np.take(state[f"h.2.mlp.{name}"], order, axis)
    found = compared(state)
    [permutation] = found.permutations
    assert (permutation.layer, permutation.units) == (2, "feed-forward units")
    assert permutation.order == tuple(np.argsort(order).tolist())
    assert found.is_same_function


def test_permuted_heads_of_a_rounded_copy_are_named() -> None:
    state = permuted_heads(random_state(CONFIG))
    found = compared({name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()})
    names = tuple(f"h.1.attn.{name}" for name in ("c_attn.weight", "c_attn.bias", "c_proj.weight"))
    assert found.permutations == (Permutation(1, "heads", ORDER, names, is_same_function=False, is_rounded=True),)
    assert {name for name, status in unequal(found).items() if status == "different"} == {*names}
    assert not found.is_same_function


def test_a_rounded_copy_without_permutation_has_none() -> None:
    state = random_state(CONFIG)
    assert compared({name: array.astype(ml_dtypes.bfloat16) for name, array in state.items()}).permutations == ()


def test_another_number_of_heads_is_not_a_permutation() -> None:
    state = permuted_heads(random_state(CONFIG))
    assert compared(state, replace(CONFIG, n_head=2)).permutations == ()


def test_swapped_layers_are_named() -> None:
    state = random_state(CONFIG)
    swapped = {
        name.replace("h.0.", "h.x.").replace("h.2.", "h.0.").replace("h.x.", "h.2."): a for name, a in state.items()
    }
    found = compared(swapped)
    assert found.copied_layers == ((0, 2), (2, 0))
    assert {name[:4] for name in unequal(found)} == {"h.0.", "h.2."}


def test_a_removed_layer_is_named_and_the_others_are_found() -> None:
    state = random_state(CONFIG)
    kept = {name.replace("h.2.", "h.1."): a for name, a in state.items() if not name.startswith("h.1.")}
    found = compared(kept, replace(CONFIG, n_layer=2))
    assert found.copied_layers == ((2, 1),)
    assert {name for name, status in unequal(found).items() if status == "only in A"} == {
        p.torch_name for p in bridge.parameters(CONFIG) if p.layer == 2
    }


@pytest.mark.parametrize("added", [0.0, 1.0])
def test_an_untied_head_is_compared_with_the_embedding(added: float) -> None:
    state = random_state(CONFIG)
    for pair in ((CONFIG, UNTIED), (UNTIED, CONFIG)):
        sides = [
            Checkpoint.of(state if c is CONFIG else {**state, "lm_head.weight": state["wte.weight"] + added}, c)
            for c in pair
        ]
        found = compare_models(*sides)
        assert found.is_same_function == (added == 0)
        assert not found.is_identical
        assert by_name(found, "lm_head.weight").status == ("different" if added else "identical")
        assert found.notes == (
            f"only {'B' if pair[1] is UNTIED else 'A'} has an untied head; it is compared with the other's wte.weight",
        )


def test_missing_biases_are_compared_with_zeros() -> None:
    without = random_checkpoint(replace(CONFIG, bias=False))
    assert compare_models(without, without.with_biases()).is_same_function
    assert compare_models(without.with_biases(), without).notes == ("only A has biases; they are compared with zeros",)
    assert not compare_models(
        without, Checkpoint.of({**random_state(CONFIG), **without.tensors}, CONFIG)
    ).is_same_function
    assert compare_models(without, without).is_identical


def test_a_copy_in_bfloat16_is_equal_up_to_dtype() -> None:
    dtype = np.dtype(ml_dtypes.bfloat16)
    found = compared({name: array.astype(dtype) for name, array in random_state(CONFIG).items()})
    assert {*unequal(found).values()} == {"rounded"}
    assert not found.is_same_function
    assert found.tensors[0].dtypes == ("float32", "bfloat16")


def test_tensors_are_read_one_pair_at_a_time() -> None:
    alive: list[str] = []

    def watched(side: str, name: str, array: np.ndarray) -> LazyTensor:
        def read() -> np.ndarray:
            copy = array.copy()
            alive.append(f"{side} {name}")
            return copy

        return LazyTensor(array.dtype, array.shape, read)

    sides = [
        replace(
            random_checkpoint(CONFIG),
            tensors=LazyTensorMap({n: watched(side, n, a) for n, a in random_state(CONFIG).items()}),
        )
        for side in "AB"
    ]
    names: list[str] = []
    assert compare_models(sides[0], sides[1], names.append).is_identical
    assert alive == [f"{side} {name}" for name in names for side in "AB"]
