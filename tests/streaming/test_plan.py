"""Plans against an obvious loop over tokens: what each query sees, at which positions, and where it lies."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import kept

from sqviz.streaming.plan import NEVER, Plan, State, choose, plan

RUNS = settings(deadline=None, derandomize=True, max_examples=100)


def seen_by(now: Plan, state: State, row: int, query: int) -> list[tuple[int, int]]:
    """[(column, position relative to the query)] that a query sees in a rotary model, read off the plan."""
    sinks, found = state.sinks[min(row, len(state.sinks) - 1)], []
    owners = range(now.new) if now.each else [query]
    index = 0
    for owner in owners:
        for sink in range(now.taken):
            if visible(now, row, query, index):
                assert owner == query
                targets = now.targets
                at = targets[min(row, len(targets) - 1), min(query, targets.shape[1] - 1), sink]
                found.append((int(sinks[sink]), int(at) - now.start - query))
            index += 1
    for at in range(now.window, now.end):
        if visible(now, row, query, index):
            found.append((state.base + at, at - now.start - query))
        index += 1
    assert index == now.keys
    return found


def visible(now: Plan, row: int, query: int, index: int) -> bool:
    if now.visible is None:  # all that came before: the model's own causal mask
        return index <= now.keys - now.new + query
    return bool(now.visible[min(row, len(now.visible) - 1), query, index])


def state_of(seen: int, recent: int, count: int, room: int) -> State:
    held = max(0, seen - recent)
    first = max(held, seen - recent + 1)
    return State(seen, first - count - room, held, None, torch.arange(count)[None])


sizes = {
    "seen": st.integers(0, 40),
    "new": st.integers(1, 20),
    "count": st.integers(0, 4),
    "recent": st.integers(1, 12),
}


@RUNS
@given(**sizes, room=st.integers(0, 5))
def test_each_query_sees_its_sinks_and_its_window_at_positions_inside_the_cache(seen, new, count, recent, room):
    state = state_of(seen, recent, count, room)
    now = plan(state, new, recent, turned=True, places=False)
    assert now.start == seen - state.base
    assert now.end == now.start + new
    assert now.window - (0 if now.each else now.taken) >= 0
    for query in range(new):
        keep = kept(seen + query, count, recent)
        expected = [(column, place - len(keep) + 1) for place, column in enumerate(keep)]
        assert seen_by(now, state, 0, query) == expected
    assert now.held == max(state.held, seen + new - recent)


@RUNS
@given(**sizes, room=st.integers(0, 5), pads=st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_rows_that_differ_by_their_padding(seen, new, count, recent, room, pads):
    seen = max(seen, 10)
    state = state_of(seen, recent, count, room)
    state.pads = torch.tensor(pads)
    state.sinks = state.pads[:, None] + torch.arange(count)[None]
    state.sinks[state.sinks >= seen + new] = NEVER
    now = plan(state, new, recent, turned=True, places=False)
    for row, pad in enumerate(pads):
        for query in range(new):
            keep = [pad + column for column in kept(seen + query - pad, count, recent)]
            expected = [(column, place - len(keep) + 1) for place, column in enumerate(keep)]
            assert seen_by(now, state, row, query) == expected


@RUNS
@given(**sizes, room=st.integers(0, 5))
def test_places_for_alibi_count_the_keys_kept(seen, new, count, recent, room):
    state = state_of(seen, recent, count, room)
    now = plan(state, new, recent, turned=False, places=True)
    assert not now.each
    columns = [*range(now.taken), *range(state.base + now.window, seen + new)]
    assert len(columns) == now.keys
    for query in range(new):
        keep = kept(seen + query, count, recent)
        shown = now.visible[0, query]
        assert [column for column, see in zip(columns, shown, strict=True) if see] == keep
        assert now.places[0, query][shown].tolist() == list(range(len(keep)))


def test_a_step_and_a_chunk_that_evicts_nothing_need_no_mask():
    state = state_of(30, 8, 3, 2)
    assert plan(state, 1, 8, turned=True, places=False).visible is None
    assert plan(state, 2, 8, turned=True, places=False).visible is not None
    for recent in (None, 50):
        now = plan(State(seen=7), 12, recent, turned=True, places=False)
        assert now.visible is None
        assert (now.keys, now.taken, now.window) == (19, 0, 0)


def test_the_number_of_keys_of_a_chunk_is_that_of_the_docstring():
    """n·s + r + n, less the current token, which is counted in r and in n."""
    now = plan(state_of(100, 8, 3, 0), 5, 8, turned=True, places=False)
    assert now.keys == 5 * 3 + 8 + 5 - 1


# --- which tokens become sinks ---


@RUNS
@given(st.data(), st.integers(0, 4), st.integers(1, 3))
def test_sinks_are_the_first_that_qualify_however_the_text_is_cut(data, wanted: int, rows: int):
    length = data.draw(st.integers(1, 20))
    ids = torch.tensor(
        data.draw(st.lists(st.lists(st.integers(0, 4), min_size=length, max_size=length), min_size=rows, max_size=rows))
    )
    tokens = data.draw(st.one_of(st.none(), st.just((1,)), st.just((0, 3))))
    positions = data.draw(st.one_of(st.none(), st.just((0, 2, 3, 11))))
    pads = data.draw(st.one_of(st.none(), st.lists(st.integers(0, length), min_size=rows, max_size=rows)))
    state = State(pads=None if pads is None else torch.tensor(pads))
    cut = data.draw(st.integers(1, length))
    for part in ids.split(cut, 1):
        state.sinks = choose(state, wanted, part, tokens, positions)
        state.seen += part.shape[1]
    assert state.sinks.shape[1] == wanted
    for row in range(rows):
        pad = pads[row] if pads else 0
        fit = [
            c
            for c in range(pad, length)
            if (tokens is None or int(ids[row, c]) in tokens) and (positions is None or c - pad in positions)
        ]
        fit = (fit + [NEVER] * wanted)[:wanted]
        assert state.sinks[min(row, len(state.sinks) - 1)].tolist() == fit


def test_rows_that_agree_share_one_row_of_sinks():
    ids = torch.randint(0, 9, (3, 6))
    assert choose(State(), 2, ids, None, None).tolist() == [[0, 1]]
    assert choose(State(), 2, ids, None, (4, 9)).tolist() == [[4, NEVER]]
    assert choose(State(pads=torch.tensor([0, 2, 5])), 2, ids, None, None).tolist() == [[0, 1], [2, 3], [5, NEVER]]
