"""Names of two sides are matched by mapping, by name, by convention and by place, and never by a guess."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2_jax.parity.pairs.matching.layouts import Layout
from gpt2_jax.parity.pairs.matching.match import Match, match_names, tied
from gpt2_jax.parity.pairs.matching.names import MatchError, normalised

LINEAR = Layout("oi", "torch.nn.Linear.weight")
KERNEL = Layout("io", "nn.Dense.kernel")


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name.replace("__", "."): rng.normal(size=shape) for name, shape in shapes.items()}


def pairs_of(*args: object, **kwargs: object) -> dict[str, str]:
    return {m.left: m.right for m in match_names(*args, **kwargs).matches}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ("h.0.mlp.c_fc.weight", "h_0.mlp.c_fc.kernel"),
        ("layers.3.attn.q.bias", "layers_3.attn.q.bias"),
        ("blocks.1.norm.weight", "h.1.norm.scale"),
        ("model.embed_tokens.weight", "embed_tokens.embedding"),
        ("bn1.running_mean", "bn1.mean"),
        ("layer1.0.conv1.weight", "layer_1.0.conv_1.kernel"),
        ("transformer.wte.weight", "params/wte/embedding"),
    ],
)
def test_names_that_differ_by_convention_match(left: str, right: str) -> None:
    names = pairs_of({left: np.zeros((3, 5)), "other.bias": np.zeros(2)}, {"z": np.zeros(9), right: np.zeros((5, 3))})
    assert names == {left: right}


def test_names_of_other_layers_and_roles_do_not_match() -> None:
    assert normalised("h.0.fc.weight") != normalised("h.1.fc.weight")
    assert normalised("fc.weight") != normalised("fc.bias")
    matching = match_names({"a.weight": np.zeros(4)}, {"b.bias": np.zeros(4)})
    assert matching.matches == ()
    assert (matching.unmatched_left, matching.unmatched_right) == (("a.weight",), ("b.bias",))


def test_a_square_kernel_is_transposed_by_the_kind_of_its_module() -> None:
    weight = np.arange(9.0).reshape(3, 3)
    (match,) = match_names(
        {"fc.weight": weight},
        {"fc.kernel": weight},
        left_layouts={"fc.weight": LINEAR},
        right_layouts={"fc.kernel": KERNEL},
    ).matches
    assert np.array_equal(match.transform(weight), weight.T)
    assert match.reason == (
        "same name by convention; torch.nn.Linear.weight is [out, in], nn.Dense.kernel is [in, out]"
    )


def test_split_axes_are_merged() -> None:
    kernel = np.arange(6 * 2 * 3.0).reshape(6, 2, 3)
    (match,) = match_names(
        {"q.weight": np.zeros((6, 6))},
        {"q.kernel": kernel},
        left_layouts={"q.weight": LINEAR},
        right_layouts={"q.kernel": Layout("ioo", "nn.DenseGeneral.kernel")},
    ).matches
    assert np.array_equal(match.transform(kernel), kernel.reshape(6, 6).T)


def test_a_square_weight_of_an_unknown_layout_is_an_error_that_says_what_to_give() -> None:
    left, right = {"fc.weight": np.zeros((3, 3))}, {"fc.w": np.zeros((3, 3))}
    with pytest.raises(MatchError, match=r"square.*layouts=\{'fc.w': 'io'\}"):
        match_names(left, right, left_layouts={"fc.weight": LINEAR})


def test_a_square_weight_follows_the_weights_that_are_not_square() -> None:
    left, right = arrays(a__weight=(3, 3), b__weight=(2, 3)), arrays(a__w=(3, 3), b__w=(3, 2))
    layouts = {"a.weight": LINEAR, "b.weight": LINEAR}
    first, second = match_names(left, right, left_layouts=layouts).matches
    x = np.arange(9.0).reshape(3, 3)
    assert np.array_equal(first.transform(x), x.T)
    assert first.reason == "same name by convention; [in, out] for [out, in]; as for the parameters that are not square"
    assert second.reason == "same name by convention; [in, out] for [out, in]"


def test_convolutions() -> None:
    kernel = np.arange(3 * 3 * 2 * 4.0).reshape(3, 3, 2, 4)
    layouts = {"conv.weight": Layout("oihw", "torch.nn.Conv2d.weight")}
    left = {"conv.weight": np.zeros((4, 2, 3, 3))}
    (match,) = match_names(left, {"conv.kernel": kernel}, left_layouts=layouts).matches
    assert np.array_equal(match.transform(kernel), kernel.transpose(3, 2, 0, 1))
    (misfit,) = match_names(left, {"conv.kernel": np.zeros((4, 2, 3, 3))}, left_layouts=layouts).misfits
    assert misfit.reason == (
        "shapes (4, 2, 3, 3) and (4, 2, 3, 3); torch.nn.Conv2d.weight is [out, in, height, width]; "
        "kernel is [height, width, in, out]"
    )


def test_a_name_that_is_alone_with_its_shape_matches() -> None:
    left, right = arrays(fc1__weight=(4, 3), fc1__bias=(4,)), arrays(Dense_0__kernel=(3, 4), Dense_0__bias=(4,))
    assert pairs_of(left, right) == {"fc1.weight": "Dense_0.kernel", "fc1.bias": "Dense_0.bias"}


def test_equal_shapes_match_by_the_forward_pass_or_not_at_all() -> None:
    left = arrays(up__weight=(3, 3), down__weight=(3, 3))
    right = arrays(Dense_0__kernel=(3, 3), Dense_1__kernel=(3, 3))
    with pytest.raises(MatchError, match=r"(?s)same shape.*left: up.weight, down.weight.*names=\{'up.weight': "):
        match_names(left, right)
    kinds = {
        "left_layouts": dict.fromkeys(left, LINEAR),
        "right_layouts": dict.fromkeys(right, KERNEL),
    }
    order = {"left_order": ["down", "up"], "right_order": ["Dense_0", "Dense_1"]}
    assert pairs_of(left, right, **kinds, **order) == {
        "up.weight": "Dense_1.kernel",
        "down.weight": "Dense_0.kernel",
    }


def test_the_given_mapping_comes_first_and_may_name_modules() -> None:
    left = arrays(up__weight=(3, 3), up__bias=(3,), down__weight=(3, 3), down__bias=(3,))
    right = arrays(down__weight=(3, 3), down__bias=(3,), x__weight=(3, 3), x__bias=(3,))
    names = {"up": "down", "down": "x"}
    assert pairs_of(left, right, names) == {
        "up.weight": "down.weight",
        "up.bias": "down.bias",
        "down.weight": "x.weight",
        "down.bias": "x.bias",
    }


def test_a_name_can_be_excluded() -> None:
    matching = match_names(arrays(a=(3,), table=(7,)), arrays(a=(3,)), {"table": None})
    assert [m.left for m in matching.matches] == ["a"]
    assert matching.unmatched_left == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"fc1.weigth": "a.kernel"}, "'fc1.weigth' is not a name of the left side; did you mean fc1.weight"),
        ({"fc1.weight": "a.kernl"}, "'a.kernl' is not a name of the right side; did you mean a.kernel"),
        ({"fc1.weight": "a.kernel", "fc2.weight": "a.kernel"}, "'a.kernel' is the right side of two entries"),
        ({"fc1.weight": "a.bias"}, r"shapes that do not fit:\n  - fc1.weight: shapes \(3, 4\) and \(4,\)"),
    ],
)
def test_a_mapping_is_validated(names: dict[str, str], message: str) -> None:
    left = arrays(fc1__weight=(3, 4), fc2__weight=(3, 4))
    with pytest.raises(MatchError, match=message):
        match_names(left, arrays(a__kernel=(4, 3), a__bias=(4,)), names)


def test_a_table_of_matches_is_validated() -> None:
    left, right = arrays(a=(2, 3), b=(4,)), arrays(a=(3, 2), b=(4,))
    good = [Match("a", "a", lambda x: x.T, "by hand")]
    assert match_names(left, right, good).unmatched_left == ("b",)
    for bad, message in (
        (Match("a", "a", lambda x: x, ""), "transformed to"),
        (Match("c", "a", lambda x: x.T, ""), "'c' is not a name of the left side"),
        (Match("b", "b", lambda x: x, ""), "'b' appears twice on the left side"),
    ):
        with pytest.raises(MatchError, match=message):
            match_names(left, right, [bad, Match("b", "b", lambda x: x, "")])


def test_a_tied_name_needs_no_partner() -> None:
    table = np.zeros((5, 3))
    left = {"tok.weight": table, "head.weight": table}
    assert tied(left) == {"head.weight": "tok.weight"}
    matching = match_names(left, {"Embed_0.embedding": np.zeros((5, 3))})
    assert [(m.left, m.right) for m in matching.matches] == [("tok.weight", "Embed_0.embedding")]
    assert matching.unmatched_left == ()


def test_every_name_without_a_partner_is_listed() -> None:
    matching = match_names(arrays(a=(2,), b=(3,)), arrays(a=(2,), c=(4,), d=(5,)))
    assert (matching.unmatched_left, matching.unmatched_right) == (("b",), ("c", "d"))
