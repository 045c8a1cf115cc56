"""`utilgen view` at the command line."""

from __future__ import annotations

from pathlib import Path

from utilgen_cli.shards.sample import Sample

from .conftest import Run, make_sample, tar_bytes


def test_it_writes_a_page_or_a_picture_and_says_where(utilgen: Run, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes(make_sample(i, i % 2) for i in range(6)))
    assert utilgen("view", "a.tar", "-o", "page.html").stdout == b"page.html\n"
    assert (tmp_path / "page.html").read_text().count("<img") == 6
    data = (tmp_path / "a.tar").read_bytes()
    assert utilgen("view", "-o", "sheet.png", input=data).stdout == b"sheet.png\n"
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_pairs_are_read_to_their_end(utilgen: Run, tmp_path: Path) -> None:
    png = make_sample(1, size=64).members["png"]
    pair = {
        "win.png": png,
        "lose.png": png,
        "cls": b"0",
        "json": b'{"win_utility": 1, "lose_utility": 0}',
    }
    whole = tar_bytes(Sample(f"{i:06d}", pair) for i in range(40))
    assert utilgen("view", "--limit", 1, "-o", "page.html", input=whole).stdout == b"page.html\n"
    cut = whole.rstrip(b"\0")
    done = utilgen("view", "--limit", 1, "-o", "cut.html", input=cut, check=False)
    assert done.returncode == 65 and b"the stream ends inside" in done.stderr


def test_a_utility_that_is_none_is_said_or_skipped(utilgen: Run, tmp_path: Path) -> None:
    samples = [make_sample(i, 0).with_member("utility.json", data)
               for i, data in enumerate((b'{"utility": 1}', b"{}", b"null", b'"hi"'))]  # fmt: skip
    (tmp_path / "a.tar").write_bytes(tar_bytes(samples))
    done = utilgen("view", "a.tar", "-o", "page.html", check=False)
    assert done.returncode == 65 and done.stderr.count(b"\n") <= 2
    utilgen("view", "a.tar", "-o", "page.html", "--on-error", "skip")
    assert (tmp_path / "page.html").read_text().count("<img") == 1


def test_what_has_no_label_or_no_picture_is_skipped(utilgen: Run, tmp_path: Path) -> None:
    whole, bare, blind = (make_sample(i) for i in range(3))
    del bare.members["cls"], blind.members["png"]
    (tmp_path / "some.tar").write_bytes(tar_bytes([bare, whole, blind]))
    assert utilgen("view", "some.tar", check=False).returncode == 65
    done = utilgen("view", "some.tar", "--on-error", "skip")
    assert b"left out 2 bad samples: 1 no image" in done.stderr
    assert "1 of 1 images in 1 classes" in (tmp_path / "view.html").read_text()


def test_errors_are_one_line_and_nothing_is_written(utilgen: Run, tmp_path: Path) -> None:
    cut = tar_bytes([make_sample(0)])[:2048]
    for args, code, words in (
        (["-o", "page.html"], 65, "end mark"),
        (["-o", "page.txt"], 2, ".html or .png"),
        (["missing.tar", "-o", "page.html"], 66, "no such file"),
        (["missing.tar", "-o", "page.html", "--title", b"caf\xe9"], 66, "no such file"),
    ):
        done = utilgen("view", *args, input=cut, check=False)
        assert done.returncode == code
        assert done.stderr.decode().startswith("utilgen: view: ")
        assert words in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1
    assert not list(tmp_path.iterdir())
