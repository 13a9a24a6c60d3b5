import pytest
import torch

from sqviz.errors import SqvizError
from sqviz.quant.granularity import PerChannel, PerGroup, PerTensor, PerToken


@pytest.mark.parametrize(
    ("granularity", "of", "shape", "expected"),
    [
        (PerTensor(), None, (5, 7), (1, 1)),
        (PerTensor(), None, (2, 5, 7), (1, 1, 1)),
        (PerToken(), "activation", (5, 7), (5, 1)),
        (PerToken(), None, (2, 5, 7), (2, 5, 1)),
        (PerChannel(), "weight", (5, 7), (5, 1)),
        (PerChannel(), "weight", (3, 5, 7), (3, 5, 1)),
        (PerChannel(), "activation", (5, 7), (1, 7)),
        (PerChannel(), "activation", (2, 5, 7), (1, 1, 7)),
        (PerGroup(7), None, (5, 7), (5, 1)),
        (PerGroup(3), None, (5, 7), (5, 3)),
        (PerGroup(100), None, (5, 7), (5, 1)),
        (PerGroup(1), None, (5, 7), (5, 7)),
    ],
)
def test_step_shape_and_extrema(granularity, of, shape, expected):
    x = torch.randn(shape)
    minimum, maximum = granularity.extrema(x, of)
    assert granularity.step_shape(shape, of) == expected
    assert minimum.shape == maximum.shape == expected
    spread = granularity.spread(maximum, shape[-1])
    assert (spread >= x).all()
    assert (granularity.spread(minimum, shape[-1]) <= x).all()
    # every bound is attained inside its own slice
    attained = torch.isclose(spread.expand(shape), x).sum()
    assert attained == maximum.numel()


def test_the_last_group_is_smaller_not_padded():
    x = torch.tensor([[-5.0, -4.0, -3.0, -2.0, -1.0]])
    minimum, maximum = PerGroup(2).extrema(x)
    assert minimum.tolist() == [[-5, -3, -1]]
    assert maximum.tolist() == [[-4, -2, -1]]  # a padded 0 would show here
    assert PerGroup(2).spread(minimum, 5).tolist() == [[-5, -5, -3, -3, -1]]


@pytest.mark.parametrize("shape", [(0, 7), (4, 0), (0, 0)])
@pytest.mark.parametrize("granularity", [PerTensor(), PerToken(), PerChannel(), PerGroup(3)])
def test_empty_tensors_have_zero_bounds(granularity, shape):
    minimum, maximum = granularity.extrema(torch.empty(shape), "activation")
    assert minimum.shape == granularity.step_shape(shape, "activation")
    assert not minimum.any()
    assert not maximum.any()


def test_granularities_are_values():
    assert PerGroup(64) == PerGroup(64) != PerGroup(32)
    assert PerTensor() == PerTensor() != PerToken()
    assert len({PerTensor(), PerTensor(), PerChannel(), PerGroup(8), PerGroup(8)}) == 3
    assert repr(PerGroup(64)) == "PerGroup(size=64)"
    with pytest.raises(AttributeError):
        PerGroup(64).size = 32


def test_what_a_granularity_cannot_mean_is_said():
    with pytest.raises(SqvizError, match=r"of='weight' or of='activation'"):
        PerChannel().extrema(torch.ones(2, 2))
    with pytest.raises(SqvizError, match=r"a weight has no tokens.*PerChannel"):
        PerToken().extrema(torch.ones(2, 2), "weight")


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_group_size_is_checked(size):
    with pytest.raises(SqvizError, match=r"PerGroup\(size=.*at least 1"):
        PerGroup(size)
