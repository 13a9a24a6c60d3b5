"""The picture of Figure 3.1: cells of one step in one shade, neighbours of different steps in different ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import sqviz
from sqviz.errors import SqvizError
from sqviz.evaluation.granularity_picture import show_granularity, step_map
from sqviz.plots.granularity import shade
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken

WAYS = [
    (PerTensor(), "activation"),
    (PerToken(), "activation"),
    (PerChannel(), "activation"),
    (PerChannel(), "weight"),
    (PerGroup(3), "weight"),
]


@pytest.mark.parametrize(("granularity", "of"), WAYS)
@given(rows=st.integers(1, 5), channels=st.integers(1, 8))
def test_cells_of_one_number_are_those_that_share_a_step(granularity, of, rows, channels):
    """By trying: a cell's largest value moves the steps of exactly the cells that have its number."""
    numbers = step_map(granularity, (rows, channels), of)
    for row in range(rows):
        for channel in range(channels):
            x = torch.zeros(rows, channels)
            x[row, channel] = 1
            low, high = granularity.extrema(x, of)
            moved = (granularity.spread(torch.maximum(high, -low), channels) != 0).expand(rows, channels)
            assert torch.equal(moved, numbers == numbers[row, channel])


@pytest.mark.parametrize(("granularity", "of"), WAYS)
def test_neighbours_differ_in_shade_exactly_if_they_differ_in_step(granularity, of):
    for numbers in (step_map(granularity, (4, 7), of), step_map(granularity, (4, 7), of).T):
        steps = numbers.numpy()
        shades = shade(steps)
        for a, b in ((slice(None, -1), slice(1, None)),):
            assert ((steps[a] == steps[b]) == (shades[a] == shades[b])).all()
            assert ((steps[:, a] == steps[:, b]) == (shades[:, a] == shades[:, b])).all()


def test_the_picture():
    picture = show_granularity([sqviz.W8A8, sqviz.ZEROQUANT, sqviz.SMOOTHQUANT_LLAMA, sqviz.Scheme(weight=None)])
    assert list(picture.steps.values()) == [(1, 1), (6, 6), (6, 6), (6, 0)]
    assert len(picture.figure().data) == 8
    assert picture.to_png().startswith(b"\x89PNG")
    assert "steps for X: 1, for W: 1" in repr(picture)
    assert "image/svg+xml" in picture._repr_mimebundle_()
    with pytest.raises(SqvizError, match="at least one"):
        show_granularity([])
    with pytest.raises(SqvizError, match="tokens=0"):
        show_granularity(tokens=0)


def test_numbers_in_cells_are_the_integers_by_hand():
    x = torch.tensor([[1.0, -2.0, 4.0], [0.5, 8.0, -0.25]])
    w = torch.tensor([[1.0, 1.0, 2.0], [3.0, 0.0, -6.0]])
    recipe = sqviz.SMOOTHQUANT_LLAMA
    picture = show_granularity([sqviz.W8A8, recipe, sqviz.Scheme(activation=None)], x=x, w=w)
    per_tensor, per_row, weight_only = picture.codes.values()
    assert per_tensor[0].tolist() == [[round(127 * v / 8) for v in row] for row in x.tolist()]
    assert per_row[0].tolist() == [[round(127 * v / max(map(abs, row))) for v in row] for row in x.tolist()]
    by_out = [[round(127 * v / max(map(abs, row))) for v in row] for row in w.tolist()]
    assert per_row[1].T.tolist() == by_out
    assert weight_only[0] is None
    svg = picture.to_svg()
    assert ">−32<" in svg
    assert ">127<" in svg
    figure = picture.figure()
    assert figure.data[0].text.tolist() == per_tensor[0].tolist()
    assert figure.data[4].hovertemplate.count("not rounded") == 1
    assert "the integers" in figure.layout.title.text


def test_matrices_that_cannot_be_drawn_are_named():
    with pytest.raises(SqvizError, match=r"x has the shape \(3,\)"):
        show_granularity(x=torch.zeros(3))
    with pytest.raises(SqvizError, match="do not fit"):
        show_granularity(x=torch.zeros(2, 3), w=torch.zeros(2, 4))
    with pytest.raises(SqvizError, match="at most 32"):
        show_granularity(x=torch.zeros(2, 33))
