"""What a stage keeps of its outputs, against plain lists of (token, bytes) per position."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.decoding.boundary import Boundary, joined
from ecotone.decoding.step import FEW_TOKENS

pytestmark = pytest.mark.pure

SLOT = st.integers(1, 3)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), SLOT, st.integers(0, 20), st.integers(1, 12)),
        st.tuples(st.just("fork"), SLOT, SLOT, st.integers(0, 20)),
        st.tuples(st.just("cut"), SLOT, st.integers(0, 20)),
        st.tuples(st.just("keep"), st.dictionaries(SLOT, st.integers(0, 20))),
    ),
    max_size=20,
)


@given(ACTIONS)
@settings(deadline=None)
def test_it_keeps_what_lists_keep(actions: list) -> None:
    kept, plain, stamp = Boundary(1 << 20), {}, 0
    for kind, *values in actions:
        match kind, values:
            case "add", (slot, start, count):
                stamp += 1
                tokens = tuple(1000 * stamp + i for i in range(count))
                kept.add(slot, start, tokens, b"".join(t.to_bytes(4, "little") for t in tokens))
                before = plain.get(slot, [])
                if len(before) >= start:
                    plain[slot] = [*before[:start], *tokens]
            case "fork", (source, target, length) if not plain.get(target) and len(plain.get(source, [])) >= length:
                kept.fork(source, target, length)
                plain[target] = plain.get(source, [])[:length]
            case "cut", (slot, length):
                kept.cut(slot, length)
                plain[slot] = plain.get(slot, [])[:length]
            case "keep", (lengths,):
                kept.keep_only(lengths)
                plain = {slot: tokens[: lengths.get(slot, 0)] for slot, tokens in plain.items()}
        plain = {slot: tokens for slot, tokens in plain.items() if tokens}
        assert {slot: kept.length(slot) for slot in kept.slots()} == {s: len(t) for s, t in plain.items()}
        for slot, tokens in plain.items():
            for start, stop in ((0, len(tokens)), (len(tokens) // 2, len(tokens))):
                pieces = list(kept.pieces(slot, start, stop))
                assert [t for p in pieces for t in p.tokens] == tokens[start:stop]
                data = b"".join(bytes(p.payload) for p in pieces)
                assert data == b"".join(t.to_bytes(4, "little") for t in tokens[start:stop])
                assert all(len(p.tokens) <= 12 for p in pieces)
    assert kept.used_bytes >= 0
    assert (kept.used_bytes > 0) == bool(plain)


def test_above_its_cap_it_gives_up_what_was_written_longest_ago() -> None:
    kept = Boundary(100)
    kept.add(1, 0, (1,) * 10, bytes(40))
    kept.add(2, 0, (1,) * 10, bytes(40))
    kept.add(1, 10, (1,), bytes(4))
    kept.add(3, 0, (1,) * 10, bytes(40))
    assert (kept.length(1), kept.length(2), kept.length(3)) == (11, 0, 10)
    assert kept.used_bytes == 84
    assert kept.num_given_up == 1
    kept.add(2, 5, (1,), bytes(4))  # with a gap before it
    assert kept.length(2) == 0


def test_bytes_that_forks_share_are_counted_once() -> None:
    kept = Boundary(1000)
    kept.add(1, 0, (1,) * 10, bytes(40))
    kept.fork(1, 2, 10)
    assert kept.used_bytes == 40
    kept.cut(1, 0)
    assert kept.used_bytes == 40
    assert kept.length(2) == 10
    kept.cut(2, 0)
    assert kept.used_bytes == 0


@given(st.lists(st.integers(1, 20), max_size=20))
def test_only_short_rows_are_joined_and_only_to_short_ones(counts: list[int]) -> None:
    pieces, at = [], 0
    for count in counts:
        pieces.append((at, count))
        at += count
    rows = list(joined(pieces))
    assert [p for first, last in rows for p in range(first, last)] == list(range(at))
    starts = {start for start, _ in pieces}
    for first, last in rows:
        assert first in starts
        if last - first > FEW_TOKENS:
            assert (first, last - first) in pieces
    short = [(a, b) for a, b in rows if b - a <= FEW_TOKENS]
    for (a, b), (c, _d) in itertools.pairwise(short):
        following = next((n for s, n in pieces if s == c), 0)
        assert b != c or (b - a) + following > FEW_TOKENS  # greedy: the next would not have fitted
    assert list(joined([(a, b - a) for a, b in rows])) == rows
