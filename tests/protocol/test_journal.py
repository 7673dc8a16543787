"""The journal's bytes: what was written comes back, a cut is forgiven at every byte, a change is not, noise is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ecotone.protocol.journal import (
    Accepted,
    Acknowledged,
    Delivered,
    Failed,
    JournalDamaged,
    JournalError,
    JournalState,
    Record,
    compacted,
    digest_of,
    encode,
    head,
    payload_of,
    replay,
)

pytestmark = pytest.mark.pure

SALT = 0x1234ABCD
HASH = "ab" * 32

names = st.text(min_size=1, max_size=8, alphabet="abcé-")
payloads = st.binary(max_size=40) | st.just(encode(Failed(number=1, kind="x", reason="embedded"), SALT ^ 1))
records = st.one_of(
    st.builds(Accepted, number=st.integers(1, 9), request_id=names, inputs=payloads, deadline_s=st.none() | st.floats(0, 9)),
    st.builds(Delivered, number=st.integers(1, 9), result=payloads, graph_hash=st.just(HASH), epoch=st.integers(0, 99)),
    st.builds(Failed, number=st.integers(1, 9), kind=st.sampled_from(["deadline", "failed"]), reason=st.text(max_size=9)),
    st.builds(Acknowledged, number=st.integers(1, 9), request_id=names),
)


def written(items: list[Record], salt: int = SALT) -> bytes:
    return head(salt) + b"".join(encode(item, salt) for item in items)


def told(data: bytes) -> dict[str, object]:
    """Everything that a journal says, with payloads in place of their places."""
    state = replay(data)

    def read(place: object, number: int) -> Record | None:
        return None if place is None else payload_of(place, data[place.offset : place.offset + place.size], number)  # type: ignore[attr-defined]

    entries = {
        n: (e.request_id, e.digest, e.deadline_s, read(e.outcome, n), None if e.outcome else read(e.accepted, n))
        for n, e in state.entries.items()
    }
    return {"entries": entries, "acknowledged": list(state.acknowledged), "next": state.next_number}


def modelled(items: list[Record]) -> dict[str, object]:
    """The same by a plain reading of the rules: first acceptance of an id, first outcome, acknowledged ids go."""
    live: dict[int, list[object]] = {}
    gone: list[str] = []
    highest = 0
    for item in items:
        highest = max(highest, item.number)
        match item:
            case Accepted():
                if item.request_id not in gone and all(v[0] != item.request_id for v in live.values()):
                    live[item.number] = [item.request_id, item, None]
            case Delivered() | Failed():
                if item.number in live and live[item.number][2] is None:
                    live[item.number][2] = item
            case Acknowledged():
                live = {n: v for n, v in live.items() if v[0] != item.request_id}
                gone = [name for name in gone if name != item.request_id] + [item.request_id]
    entries = {
        n: (name, digest_of(a.inputs), a.deadline_s, outcome, None if outcome else a)  # type: ignore[attr-defined]
        for n, (name, a, outcome) in live.items()
    }
    return {"entries": entries, "acknowledged": gone, "next": highest + 1}


def distinct(items: list[Record]) -> list[Record]:
    """A writer never accepts one number under two ids."""
    seen: set[int] = set()
    kept: list[Record] = []
    for item in items:
        if isinstance(item, Accepted):
            if item.number in seen:
                continue
            seen.add(item.number)
        kept.append(item)
    return kept


@given(st.lists(records, max_size=12).map(distinct))
def test_replay_says_what_was_written(items: list[Record]) -> None:
    assert told(written(items)) == modelled(items)


@settings(max_examples=30)
@given(st.lists(records, min_size=1, max_size=5).map(distinct))
def test_a_cut_at_any_byte_leaves_the_records_before_it(items: list[Record]) -> None:
    data, ends = written(items), [len(written(items[:n])) for n in range(len(items) + 1)]
    for cut in range(len(data)):
        state = replay(data[:cut])
        whole = max((n for n, end in enumerate(ends) if end <= cut), default=0)
        assert state.end == (ends[whole] if cut >= ends[0] else 0)
        assert state.torn_bytes == cut - state.end
        if cut >= ends[0]:
            assert told(data[:cut]) == modelled(items[:whole])


@given(st.lists(records, min_size=2, max_size=5).map(distinct), st.data())
def test_a_changed_byte_is_refused_or_costs_only_the_last_record(items: list[Record], data: st.DataObject) -> None:
    whole = written(items)
    at = data.draw(st.integers(0, len(whole) - 1))
    bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    last = len(written(items[:-1]))
    if at < last:
        with pytest.raises(JournalDamaged):
            replay(bad)
    else:
        assert told(bad) == modelled(items[:-1])


@given(st.binary(min_size=1, max_size=200))
def test_noise_is_refused(noise: bytes) -> None:
    if not head(0).startswith(noise[:8]):
        with pytest.raises(JournalDamaged, match="no journal"):
            replay(noise)


def test_an_empty_file_is_a_journal_not_yet_begun() -> None:
    assert replay(b"") == JournalState()
    assert replay(head(7)[:9]) == JournalState(torn_bytes=9)


def test_another_version_is_named() -> None:
    with pytest.raises(JournalDamaged, match="has version 9, this program reads 1"):
        replay(b"ECTNJRN\x09" + head(1)[8:])


def test_bytes_of_a_request_do_not_pass_for_records() -> None:
    """A torn tail whose inputs hold a whole journal of another salt is still torn, not damaged."""
    inner = written([Failed(number=1, kind="failed", reason="x")], salt=SALT + 1)
    data = written([Accepted(number=1, request_id="a", inputs=inner + bytes(50))])
    state = replay(data[:-10])
    assert not state.entries
    assert state.torn_bytes == len(data) - 10 - 16


@given(st.lists(records, max_size=12).map(distinct))
def test_compaction_says_the_same_in_less(items: list[Record]) -> None:
    data = written(items)
    state = replay(data)
    small = b"".join(compacted(state, data, SALT + 5))
    assert told(small) == told(data)
    again = replay(small)
    assert b"".join(compacted(again, small, SALT + 5)) == small


def test_compaction_drops_the_inputs_of_what_is_finished_and_all_of_what_is_acknowledged() -> None:
    items = [
        Accepted(number=1, request_id="done", inputs=b"i" * 1000),
        Delivered(number=1, result=b"r" * 10, graph_hash=HASH),
        Accepted(number=2, request_id="gone", inputs=b"i" * 1000),
        Delivered(number=2, result=b"r" * 1000, graph_hash=HASH),
        Acknowledged(number=2, request_id="gone"),
        Accepted(number=3, request_id="open", inputs=b"i" * 500),
    ]
    small = b"".join(compacted(replay(written(items)), written(items), SALT))
    assert len(small) < 500 + 10 + 400
    assert replay(small).find("done") is not None
    assert [entry.request_id for entry in replay(small).unfinished] == ["open"]


def test_a_clock_that_goes_backwards_takes_nothing_from_a_deadline() -> None:
    data = written([Accepted(number=1, request_id="a", inputs=b"", deadline_s=4.0, at_s=100.0)])
    entry = replay(data).entries[1]
    assert entry.left_s(101.0) == 3.0
    assert entry.left_s(50.0) == 4.0
    assert entry.left_s(105.0) == -1.0


@pytest.mark.parametrize("name", ["", "x" * 513])
def test_an_id_that_is_too_short_or_long_is_refused(name: str) -> None:
    with pytest.raises(JournalError, match="use 1 to 512"):
        encode(Accepted(number=1, request_id=name, inputs=b""), SALT)
