"""Contact sheets: the right images, in one pass, in a page that loads nothing."""

from __future__ import annotations

import base64
import io
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utilgen_cli.report.html import Markup, page, table, tag
from utilgen_cli.report.sheets import collect, same_keys, thumbnail
from utilgen_cli.report.view import view_page, view_png
from utilgen_cli.runtime.errors import NoInput
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.sample import Sample

from .conftest import make_sample

HOSTILE = "<script>alert('x')</script>"


class Page(HTMLParser):
    """Balanced tags, and what the page would load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.loaded: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(name)
        if name not in ("img", "meta", "path", "use"):
            self.open.append(name)
        for key, value in attributes:
            if key in ("src", "href", "xlink:href", "srcset"):
                self.loaded.append(value or "")

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(name, attributes)
        if self.open and self.open[-1] == name:
            self.open.pop()

    def handle_endtag(self, name: str) -> None:
        if name not in ("img", "meta", "path", "use"):
            assert self.open.pop() == name


def scored(number: int, label: int, utility: float) -> Sample:
    return make_sample(number, label).with_member("utility.json", encode_json({"utility": utility}))


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from([0.1, 0.2, 0.5, 0.9]))), st.integers(1, 4)
)
@settings(max_examples=25, deadline=None)
def test_the_highest_and_lowest_are_those_of_a_sort(
    items: list[tuple[int, float]], limit: int
) -> None:
    samples = [
        Sample(f"k{i}", {"cls": str(c).encode(), "utility.json": encode_json({"utility": u})})
        for i, (c, u) in enumerate(items)
    ]
    for sheet in collect(samples, limit):
        own = [s for s in samples if s.label == int(sheet.name)]
        assert sheet.count == len(own)
        ascending = sorted(own, key=lambda s: s.parsed("utility.json")["utility"])  # stable
        descending = sorted(own, key=lambda s: -s.parsed("utility.json")["utility"])
        assert [s.sample.key for s in sheet.lowest] == [s.key for s in ascending[:limit]]
        assert [s.sample.key for s in sheet.highest] == [s.key for s in descending[:limit]]


def test_unscored_images_stand_in_the_order_of_the_shards() -> None:
    [sheet] = collect([make_sample(i) for i in range(9)], 4)
    assert [s.sample.key for s in sheet.highest] == [f"0000-{i:06d}" for i in range(4)]


def test_pairs_of_equal_keys_come_class_by_class() -> None:
    first = [make_sample(i, i % 2) for i in range(8)]
    second = [make_sample(i, i % 2, size=9) for i in (6, 5, 3, 2, 1)]
    keys = [a.key for a, b in same_keys(first, second, 2) if a.key == b.key]
    assert keys == ["0000-000002", "0001-000003", "0001-000001"]


@pytest.mark.parametrize(("side", "kind"), [(32, "png"), (300, "jpeg")])
def test_thumbnails_are_small_and_small_images_untouched(side: int, kind: str) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    media, data = thumbnail(rgb)
    image = Image.open(io.BytesIO(data))
    assert media == f"image/{kind}"
    assert max(image.size) <= 96
    assert kind == "jpeg" or np.array_equal(np.asarray(image), rgb)


def test_text_is_escaped_and_markup_is_not() -> None:
    assert tag("p", HOSTILE, title='"') == (
        '<p title="&quot;">&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;</p>'
    )
    assert tag("p", tag("b", 1), None, Markup("&amp;")) == "<p><b>1</b>&amp;</p>"


def test_a_page_is_well_formed_and_loads_nothing() -> None:
    text = page(HOSTILE, table(["a", HOSTILE], [[1, 2], [HOSTILE, 3]], HOSTILE))
    assert "script" not in Page(text).seen
    assert "default-src 'none'" in unescape(text)


def test_a_view_shows_each_class_with_its_best_first_and_its_names_escaped() -> None:
    samples = [scored(i, i % 3, i / 10) for i in range(9)]
    samples[0] = make_sample(0, 0, class_name=HOSTILE)
    for sample in samples[3::3]:
        del sample.members["json"]  # of class 0: it is called as the first one says
    text = view_page(samples, "synth/", limit=2)
    parsed = Page(text)
    assert "script" not in parsed.seen
    assert parsed.seen.count("img") == 6
    assert all(source.startswith("data:image/png;base64,") for source in parsed.loaded)
    assert text.index("0002-000008") < text.index("0002-000005")
    assert "0002-000002" not in text
    assert view_page(samples, "t", 2, lowest=True).count("0002-000002") > 0
    first = base64.b64decode(parsed.loaded[0].partition(",")[2])
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_view_of_pairs_shows_winner_and_loser(kind: str) -> None:
    one, two = (
        encode_image(np.full((8, 8, 3), v, np.uint8), k) for v, k in ((10, "png"), (200, kind))
    )
    facts = encode_json({"win_key": "a-win", "lose_key": "a-lose"})
    pair = Sample("a", {"win.png": one, f"lose.{kind}": two, "cls": b"1", "json": facts})
    parsed = Page(view_page([pair], "pairs/", 4))
    values = [
        int(np.asarray(Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))))[0, 0, 0])
        for s in parsed.loaded
    ]
    assert values == [10, 200]


def test_a_contact_sheet_png_holds_the_images_in_rows() -> None:
    samples = [
        Sample(f"k{c}{i}", {"png": encode_image(np.full((8, 8, 3), 40 + 60 * c + i, np.uint8)),
                            "cls": str(c).encode()})
        for c in range(3) for i in range(2)
    ]  # fmt: skip
    image = np.asarray(Image.open(io.BytesIO(view_png(samples, 5))).convert("L"))
    counts = dict(zip(*np.unique(image, return_counts=True), strict=True))
    assert all(counts[40 + 60 * c + i] >= 64 * 64 for c in range(3) for i in range(2))


def test_nothing_to_view_is_no_input() -> None:
    with pytest.raises(NoInput):
        view_page([], "t", 3)
