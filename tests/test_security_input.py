"""Hostile tars and hostile names: nothing is written outside, nothing runs, everything is bounded."""

from __future__ import annotations

import io
import os
import re
import tarfile
import time
import tracemalloc
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from utilgen_cli.diffusion.tokens import class_folder
from utilgen_cli.report.view import view_page, view_png
from utilgen_cli.runtime.errors import LONGEST, BadInput, UtilgenError, printable
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import decode_rgb, encode_image
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.reader import MAX_MEMBERS, read_tar
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import tar_member

from .conftest import Run, make_sample, tar_bytes


class Endless(io.RawIOBase):
    """A stream that is made while it is read."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self.blocks, self.left = blocks, b""

    def read(self, size: int = -1) -> bytes:
        while len(self.left) < size and (block := next(self.blocks, b"")):
            self.left += block
        data, self.left = self.left[:size], self.left[size:]
        return data


def peak_of(stream: io.RawIOBase) -> tuple[int, int, str]:
    """(samples read, most bytes held, the error that ended it)."""
    tracemalloc.start()
    count, said = 0, ""
    try:
        for _ in read_tar(stream, "hostile"):  # type: ignore[arg-type]
            count += 1
    except BadInput as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return count, peak, said


def test_many_samples_are_read_in_flat_memory() -> None:
    members = (tar_member(f"k{i}.cls", b"1") for i in range(3_000))
    count, peak, said = peak_of(Endless(members))
    assert count == 2_999  # the last one may go on after the cut
    assert "end mark is missing" in said
    assert peak < 200_000


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ((tar_member(f"k.m{i}", b"") for i in range(10**6)), f"more than {MAX_MEMBERS} members"),
        ((tarfile.TarInfo(f"d{i}").tobuf() for i in range(10**6)), "no extension"),
        ((bytes(1 << 16) for _ in range(10**9)), "zero bytes after an end mark"),
        (iter([tarfile.TarInfo("x").create_pax_global_header({"a": "b"})] * 10**5), "too many extended"),
    ],
    ids=["a million members", "files without extension", "endless padding", "endless headers"],
)  # fmt: skip
def test_endless_tars_end_soon(blocks: Iterator[bytes], why: str) -> None:
    start = time.monotonic()
    count, peak, said = peak_of(Endless(blocks))
    assert count == 0
    assert why in said
    assert peak < 4_000_000
    assert time.monotonic() - start < 30


def test_a_terabyte_of_holes_is_refused_at_once(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.png")
    info.size = 10**12
    for name, head in (("claimed.tar", info.tobuf()), ("nothing.tar", b"")):
        (tmp_path / name).write_bytes(head)
        os.truncate(tmp_path / name, 10**12)
        with pytest.raises(BadInput, match=r"claims|zero bytes"):
            list(open_source([str(tmp_path / name)]).samples())


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE], ids=["gnu", "pax"])
def test_sparse_members_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.size = kind, 512
    entry = b"GNU.sparse.realsize=1000000000000\n"
    body = f"{len(entry) + 3} ".encode() + entry
    with pytest.raises(BadInput, match="sparse"):
        list(read_tar(io.BytesIO(_of_size(info, len(body)) + body + bytes(2048)), "x"))


def _of_size(info: tarfile.TarInfo, size: int) -> bytes:
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("name", ["../../out.png", "/tmp/out.png", "a/../../out.png", "..\\out.png", "C:\\out.png", "a\0b.png", "\x1b[2Jx.png"])  # fmt: skip
def test_no_name_writes_anything_anywhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    (inside / "x.tar").write_bytes(_named(name) + bytes(1024))
    try:
        list(open_source(["x.tar"]).samples())
    except UtilgenError as error:
        assert str(error).isprintable()
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [inside / "x.tar"]


def _named(name: str) -> bytes:
    return tarfile.TarInfo(name).tobuf(tarfile.PAX_FORMAT)


def test_a_line_of_pixels_is_not_scaled_up() -> None:
    line = np.zeros((1, 60_000, 3), np.uint8)
    sample = Sample("a", {"png": encode_image(line)})
    tracemalloc.start()
    assert decode_rgb(sample, 64).shape == (64, 64, 3)
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


HOSTILE = ["$(touch x)", "`touch x`", "; touch x;", "../../x", "nul\0nul", "\x1b[31mred\x1b[0m\x07",
           "<script>touch()</script>", '"><img src=x onerror=touch()>', "%s{0}{x}", "\u202eevil"]  # fmt: skip


class Tags(HTMLParser):
    """Every tag and attribute of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(f"{tag} {name}" for name, _ in attrs)}


def hostile_samples() -> list[Sample]:
    found = [make_sample(i, i, class_name=name, prompt=name) for i, name in enumerate(HOSTILE)]
    return [s.with_member("utility.json", b'{"utility": 0.5}') for s in found]


def test_hostile_names_are_text_in_a_page() -> None:
    page = view_page(hostile_samples(), HOSTILE[6], 3)
    tags = Tags(page).found
    assert "script" not in tags
    assert not [t for t in tags if " on" in t]
    assert "&lt;script&gt;touch()" in page
    assert "\x1b" not in page and "\0" not in page


def test_hostile_names_reach_no_shell_no_file_and_no_terminal(utilgen: Run, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(hostile_samples()))
    before = {p.name for p in tmp_path.iterdir()}
    said = utilgen("pairs", "a.tar").stderr.decode()
    said += utilgen("check", "a.tar").stderr.decode()
    utilgen("view", "a.tar", "-o", "page.png")
    assert "touch x" in said
    assert all(line.isprintable() for line in said.splitlines())
    assert {p.name for p in tmp_path.iterdir()} - before == {"page.png"}


def test_a_class_name_makes_no_path() -> None:
    for index, name in enumerate(HOSTILE):
        assert re.fullmatch(rf"{index:04d}(-[a-z0-9-]+)?", class_folder(index, name))


def test_ten_megabytes_of_name_stay_small_where_people_look() -> None:
    name = "\x1b" * 10_000_000
    sample = make_sample(0, class_name=name).with_member(
        "utility.json", encode_json({"utility": 1})
    )
    start = time.monotonic()
    assert len(printable(name)) < 5 * LONGEST
    assert len(str(sample.bad(name))) < 10 * LONGEST
    assert len(view_page([sample], "title", 3)) < 100_000
    assert len(view_png([sample], 3)) < 100_000
    assert time.monotonic() - start < 10
