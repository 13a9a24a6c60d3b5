"""Policies as values: what they allow, how much they keep, what a wrong one says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqviz.errors import SqvizError
from sqviz.streaming.policies import Dense, Recompute, Sinks, Window, capacity, of_size


def test_values_that_compare_and_hash():
    assert Sinks() == Sinks(4, 252) != Sinks(4, 253)
    assert len({Sinks(4, 6), Sinks(4, 6), Window(6), Recompute(6), Dense(), Dense()}) == 4
    assert Sinks(tokens=[7, 3, 7]).tokens == (3, 7)
    assert Sinks(positions=(5, 0)).positions == (0, 5)
    assert hash(Sinks(tokens=[7, 3])) == hash(Sinks(tokens=(3, 7)))


def test_all_answer_how_many_sinks_and_how_many_recent():
    assert [(p.sinks, p.recent, capacity(p)) for p in (Dense(), Window(6), Sinks(0, 6), Sinks(4, 6))] == [
        (0, None, None),
        (0, 6, 6),
        (0, 6, 6),
        (4, 6, 10),
    ]
    assert capacity(Recompute(9)) == 9


@given(st.integers(1, 10**6), st.integers(0, 64))
def test_of_size_keeps_exactly_so_many(size: int, sinks: int):
    if sinks < size:
        assert of_size(size, sinks) == Sinks(sinks, size - sinks)
        assert capacity(of_size(size, sinks)) == size
    else:
        with pytest.raises(SqvizError, match=rf"{sinks} sinks do not fit into a cache of {size} keys.*one recent key"):
            of_size(size, sinks)


@pytest.mark.parametrize("recent", [0, -1, True, 2.0, "6", None])
@pytest.mark.parametrize("kind", [Window, Recompute, lambda recent: Sinks(4, recent)])
def test_a_window_holds_one_key_at_least(kind, recent):
    with pytest.raises(SqvizError, match=r"recent=.*the current token is one of the recent ones, so 1 at least"):
        kind(recent)


@pytest.mark.parametrize("sinks", [-1, True, 1.0, "4", None])
def test_sinks_are_a_number_of_tokens(sinks):
    with pytest.raises(SqvizError, match=r"sinks=.*a number of tokens, 0 at least"):
        Sinks(sinks, 6)


@pytest.mark.parametrize("name", ["tokens", "positions"])
@pytest.mark.parametrize("chosen", [(), [], (-1,), (2.5,), "ab", 7, (True,)])
def test_what_may_become_a_sink_is_a_choice_of_whole_numbers(name: str, chosen):
    with pytest.raises(SqvizError, match=rf"{name}=.*one or more whole numbers, 0 at least, or None for any"):
        Sinks(4, 6, **{name: chosen})
