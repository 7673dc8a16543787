"""The report: well formed, self-contained, escaped, and saying the numbers that it was given."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from report_sample import contender, result

from ecotone.schema import SchemaError
from ecotone.web.drawing import curve_picture, latency_picture, milliseconds, plan_picture, size
from ecotone.web.picture import report_png
from ecotone.web.report import report_html
from ecotone.web.result import Result

pytestmark = pytest.mark.pure

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Checks that every tag is closed by its own name, and collects the visible text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data


def test_every_tag_is_closed_and_the_table_says_the_numbers() -> None:
    page, shown = Balance(), result()
    page.feed(report_html(shown))
    assert page.open == []
    rows = [page.cells[i : i + 9] for i in range(0, len(page.cells), 9)]
    contenders = [c for act in shown.acts for c in act.contenders]
    assert [row[0].startswith(c.name) for row, c in zip(rows, contenders, strict=True)] == [True] * 8
    assert rows[3][1:6] == ["37.0 ms", "44.4 ms", "37.8", "8.5 kB", "86.0%"]
    assert rows[3][7:] == ["35.5 ms", "-4%"]


def test_the_page_needs_nothing_from_outside() -> None:
    page = report_html(result())
    assert not re.search(r"<script|<link|<img|@import|https?://|src=", page)
    assert set(re.findall(r"url\(([^)]*)\)", page)) == {"#tip"}
    assert "prefers-color-scheme:dark" in page


def test_words_from_outside_are_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">&'
    plain = result()
    act = plain.acts[0]
    ours = replace(act.contenders[3], name=evil, words=evil)
    points = tuple(replace(p, first=evil, codec=evil) for p in act.curve)
    hostile = replace(act, title=evil, headline=evil, contenders=(*act.contenders[:3], ours), curve=points)
    page = report_html(
        replace(plain, network=evil, conclusion=evil, acts=(hostile,), context={evil: evil}, block_names=(evil,) * 48)
    )
    assert "<img" not in page
    assert page.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;") >= 9


@pytest.mark.parametrize("act", [0, 1])
def test_pictures_are_xml(act: int) -> None:
    shown = result()
    now, before = shown.acts[act], shown.acts[act - 1] if act else None
    for picture in (
        plan_picture(now.contenders[3], now, shown),
        latency_picture(now.contenders),
        curve_picture(now, before, shown),
    ):
        ElementTree.fromstring(picture)


def test_the_strip_is_as_wide_as_the_work_and_marks_each_cut() -> None:
    shown = result()
    root = ElementTree.fromstring(plan_picture(shown.acts[0].contenders[3], shown.acts[0], shown))
    bars = [r for r in root.iter("rect") if (r.get("class") or "").startswith("bar")]
    widths = [float(bar.get("width") or 0) for bar in bars]
    assert [round(w / sum(widths), 3) for w in widths] == [round(s / 48, 3) for s in (20, 24, 4)]
    words = [text.text for text in root.iter("text")]
    assert "cut at 20" in words
    assert "cut at 44" in words
    assert "4.1 kB int4+zstd" in words


def test_a_plan_on_one_device_draws_the_others_as_unused() -> None:
    shown = result()
    local = replace(shown.acts[0].contenders[3], stages=shown.acts[0].contenders[3].stages[:1], links=())
    root = ElementTree.fromstring(plan_picture(local, shown.acts[0], shown))
    assert [text.text for text in root.iter("text")].count("computes nothing") == 2


def test_bars_are_in_proportion() -> None:
    pair = [contender("device", "a", "", 0.08, 0, 0.5), contender("ecotone", "b", "", 0.02, 0, 0.5)]
    root = ElementTree.fromstring(latency_picture(pair))
    long, short = (float(rect.get("width") or 0) for rect in root.iter("rect"))
    assert long / short == pytest.approx(4, rel=0.01)


def test_json_round_trip_and_its_violations() -> None:
    shown = result()
    assert Result.from_json(shown.to_json()) == shown
    with pytest.raises(SchemaError, match=r"accuracy is 1\.5"):
        Result.from_json(shown.to_json().replace('"accuracy": 0.861', '"accuracy": 1.5'))
    with pytest.raises(SchemaError, match="schema is"):
        Result.from_json("{}")


@pytest.mark.parametrize(
    ("value", "words"),
    [(0.00831, "8.31 ms"), (0.0123, "12.3 ms"), (0.1239, "124 ms"), (1.239, "1.24 s"), (0.9996, "1 s"), (0.0, "0.00 ms")],
)
def test_milliseconds(value: float, words: str) -> None:
    assert milliseconds(value) == words


def test_size() -> None:
    assert [size(v) for v in (0, 999, 4213, 4.2e6)] == ["0 B", "999 B", "4.21 kB", "4.2 MB"]


def test_the_same_result_gives_the_same_page() -> None:
    assert report_html(result()) == report_html(result())


def test_png() -> None:
    pytest.importorskip("matplotlib", reason="the PNG report needs matplotlib")
    data = report_png(result())
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = (int.from_bytes(data[i : i + 4]) for i in (16, 20))
    assert width == 1920
    assert height > 900
