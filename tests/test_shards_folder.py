"""What `pack` takes of a folder or a CSV, what it leaves out, and what it says of that."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest

from utilgen_cli.runtime.errors import BadInput, NoInput
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards import folder as folders
from utilgen_cli.shards.folder import ImageList, list_images, listing_digest, pack_images, readable
from utilgen_cli.shards.images import decode_rgb, encode_image
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.quarantine import Quarantine
from utilgen_cli.shards.sample import BadSample

from .conftest import Run, make_sample

GOOD = make_sample(1).members["png"]


def photos(root: Path, *names: str, data: bytes = GOOD) -> Path:
    """A folder with these files."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def names(listed: ImageList) -> list[str]:
    return [path.name for _, path in listed.images]


def chosen(paths: list[Path], shots: int, label: int = 0, seed: int = 0) -> list[Path]:
    return sorted(random.Random(f"{seed}/{label}").sample(paths, shots))


def test_shots_are_drawn_as_ever_where_nothing_is_bad(tmp_path: Path) -> None:
    photos(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(9)))
    for seed in range(4):
        listed = list_images(tmp_path, 4, seed)
        expected = [(label, path) for label, c in enumerate(("cat", "dog"))
                    for path in chosen(sorted((tmp_path / c).iterdir()), 4, label, seed)]  # fmt: skip
        assert listed.images == expected
        assert readable(listed, Quarantine(skip=True)) == list(enumerate(expected))


def test_another_of_its_class_comes_for_a_bad_shot(tmp_path: Path) -> None:
    photos(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(9)))
    bad = chosen(sorted((tmp_path / "cat").iterdir()), 3)[:2]
    for path in bad:
        path.write_bytes(b"none")
    aside = Quarantine(skip=True)
    listed = list_images(tmp_path, 3)
    kept = readable(listed, aside)
    assert [number for number, _ in kept] == list(range(6))
    assert [label for _, (label, _) in kept] == [0, 0, 0, 1, 1, 1]
    assert len({path for _, (_, path) in kept}) == 6 and not {p for _, (_, p) in kept} & {*bad}
    assert kept == readable(list_images(tmp_path, 3), Quarantine(skip=True))
    assert aside.reasons == {"corrupt image": 2}
    digest = listing_digest(listed, kept)
    kept[0][1][1].write_bytes(GOOD + b"more")
    assert listing_digest(listed, kept) != digest


def test_few_shots_of_many_images_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, *(f"cat/{i}.png" for i in range(50)))
    chosen(sorted((tmp_path / "cat").iterdir()), 2)[0].write_bytes(b"none")
    read = []
    monkeypatch.setattr(folders, "_read", lambda path: read.append(path) or path.read_bytes())
    assert len(readable(list_images(tmp_path, 2), Quarantine(skip=True))) == 2
    assert len(read) == 3


@pytest.mark.parametrize("shots", [None, 1, 5])
def test_a_class_with_nothing_left_is_named(tmp_path: Path, shots: int | None) -> None:
    photos(photos(tmp_path, "cat/1.png"), *(f"dog/{i}.png" for i in range(3)), data=b"none")
    with pytest.raises(BadInput, match="class dog: none of its images"):
        readable(list_images(tmp_path, shots), Quarantine(skip=True))


@pytest.mark.parametrize(("text", "match"), [
    (b"path,label\ncat/1.png,caf\xe9\n", r"a\.csv: is not UTF-8\. Save it as UTF-8"),
    ("path,label\ncat/1.png,cat\n".encode("utf-16"), "is not UTF-8"),
    (b"path,label\ncat/1.png," + b"x" * 200_000, r"line \d: field larger than field limit"),
])  # fmt: skip
def test_a_list_that_cannot_be_read_is_bad_input(tmp_path: Path, text: bytes, match: str) -> None:
    (photos(tmp_path, "cat/1.png") / "a.csv").write_bytes(text)
    with pytest.raises(BadInput, match=match):
        list_images(tmp_path / "a.csv")


def test_a_path_that_is_too_long_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f"path,label\n{'x' * 300}.png,cat\n")
    with pytest.raises(NoInput, match=r"line 2: x*\.png does not exist"):
        list_images(tmp_path / "a.csv")
    with pytest.raises(NoInput, match="no such file or directory"):
        list_images(tmp_path / ("x" * 5000))


@pytest.mark.parametrize("name", ["cat/1.jfif", "cat/1.JPE", "cat/1.jpeg"])
def test_every_name_of_jpeg_is_taken(tmp_path: Path, name: str) -> None:
    listed = list_images(photos(tmp_path, name, data=make_jpeg()))
    (sample,) = pack_images(readable(listed, Quarantine()), listed, None)
    assert list(sample.members) == ["jpg", "cls", "json"]
    assert listed.line() is None and listed.summary() == {}


def make_jpeg() -> bytes:
    return encode_image(decode_rgb(make_sample(1)), "jpeg")


def test_files_that_are_left_out_are_told(utilgen: Run, tmp_path: Path) -> None:
    photos(tmp_path / "p", "cat/1.png", "cat/2.bmp", "cat/a/3.TIF", "cat/4", "5.jpg", "6.jpg", "7.bmp",
           ".hidden.bmp", "cat/.DS_Store")  # fmt: skip
    done = utilgen("pack", "p", "-o", "real", "--json")
    told, summary = done.stderr.decode().splitlines()
    assert told == (
        "utilgen: pack: left out 4 files that are no PNG, JPEG or WebP (.bmp, .tif, no suffix) "
        "and 2 images outside of the class folders"
    )
    assert json.loads(summary)["ignored"] == {"": 1, ".bmp": 2, ".jpg": 2, ".tif": 1}
    assert b"left out" not in utilgen("pack", "p", "-o", "real", "-q").stderr
    photos(tmp_path / "q", "cat/1.png", "5.jpg")
    only = utilgen("pack", "q", "-o", "other").stderr.decode().splitlines()
    assert only[0].endswith("pack: left out 1 images outside of the class folders")
    photos(tmp_path / "r", "cat/1.png")
    assert "ignored" not in json.loads(utilgen("pack", "r", "-o", "third", "--json").stderr)


def test_what_is_hidden_inside_a_class_is_not_packed(tmp_path: Path) -> None:
    photos(tmp_path, "cat/1.png", "cat/._1.png", "cat/.ipynb_checkpoints/1-checkpoint.png",
           "cat/more/.trash/deep/2.png", "cat/more/3.png")  # fmt: skip
    listed = list_images(tmp_path)
    assert names(listed) == ["1.png", "3.png"] and not listed.ignored
    hidden = photos(tmp_path / ".here", "cat/1.png")  # above the class folders nothing is hidden
    assert names(list_images(hidden)) == ["1.png"]


def test_a_linked_folder_is_read_and_read_once(tmp_path: Path) -> None:
    """A class may be put together of links, and links may lead around."""
    photos(tmp_path / "elsewhere", "more/2.png", "more/3.png")
    photos(tmp_path / "photos", "cat/1.png", "cat/inner/4.png")
    cat = tmp_path / "photos" / "cat"
    (cat / "linked").symlink_to(tmp_path / "elsewhere" / "more")
    (cat / "inner" / "up").symlink_to(cat)
    (cat / "twice").symlink_to(cat / "inner")
    assert names(list_images(tmp_path / "photos")) == ["1.png", "4.png", "2.png", "3.png"]


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    photos(tmp_path, "cat/album.jpg/1.png", "cat/2.png")
    assert names(list_images(tmp_path)) == ["2.png", "1.png"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_file_that_cannot_be_read_is_a_bad_sample(
    kind: str, utilgen: Run, tmp_path: Path
) -> None:
    broken = photos(tmp_path / "p", "cat/1.png") / "cat" / "broken.jpg"
    broken.symlink_to("nothing") if kind == "link" else os.mkfifo(broken)
    done = utilgen("pack", "p", "-o", "real", check=False)
    (line,) = done.stderr.decode().splitlines()
    assert done.returncode == 65 and "broken.jpg: sample 0000-000001: its file cannot be" in line
    done = utilgen("pack", "p", "-o", "skipped", "--on-error", "skip", "--json")
    assert json.loads(done.stderr.splitlines()[-1])["quarantined"]["reasons"] == {
        "unreadable file": 1
    }


def test_a_file_without_permission_is_a_bad_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders, "_read", closed)
    listed = list_images(photos(tmp_path, "cat/1.png"))
    with pytest.raises(BadSample, match="Permission denied") as found:
        list(pack_images(readable(listed, Quarantine()), listed, None))
    assert found.value.reason == "unreadable file"


def odd(path: Path, name: bytes) -> Path:
    """A path with a name that is not UTF-8; a skipped test where the disk takes none."""
    try:
        (found := path / os.fsdecode(name)).mkdir(parents=True)
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    return found


def test_a_class_whose_name_is_not_utf8_is_refused(utilgen: Run, tmp_path: Path) -> None:
    photos(odd(tmp_path / "p", b"caf\xe9"), "1.png")
    done = utilgen("pack", "p", "-o", "real", check=False)
    assert done.returncode == 65 and b"its name is not UTF-8. Rename it." in done.stderr


def test_a_file_whose_name_is_not_utf8_is_packed_under_a_text(utilgen: Run, tmp_path: Path) -> None:
    odd(tmp_path / "p" / "cat", b"x\xe9").rmdir()
    photos(tmp_path / "p" / "cat", os.fsdecode(b"caf\xe9.png"), os.fsdecode(b"a.x\xe9"))
    photos(tmp_path / "p" / "cat", os.fsdecode(b"bad\xe9.png"), data=b"none")
    done = utilgen("pack", "p", "-o", "real", "--on-error", "skip", "--json")
    (sample,) = open_source([str(tmp_path / "real")]).samples()
    assert sample.facts["file"] == "caf\ufffd.png"
    summary = json.loads(done.stderr.splitlines()[-1])
    assert summary["ignored"] == {".x\ufffd": 1}
    assert json.dumps(summary, ensure_ascii=False).encode()  # no lone surrogate anywhere


@pytest.mark.parametrize("output", ["real", "out/real", "cat/real"])
def test_the_output_is_no_class(output: str, utilgen: Run, tmp_path: Path) -> None:
    photos(tmp_path, "cat/1.png", "dog/1.png")
    said = [utilgen("pack", ".", "-o", output, "--json").stderr for _ in range(3)]
    assert said[0] == said[1] == said[2] == encode_json({"classes": ["cat", "dog"], "samples": 2})


@pytest.mark.parametrize("source", ["photos", "list.csv"])
def test_one_folder_is_divided_without_an_image_in_two_parts(
    utilgen: Run, tmp_path: Path, source: str
) -> None:
    """Images of one name in two folders of a class are two; a bad shot's place goes to no image
    that another part has."""
    files = [f"{c}/{day}/{i}.png" for c in ("cat", "dog") for day in ("a", "b") for i in range(5)]
    photos(tmp_path / "photos", *files)
    (tmp_path / "photos" / "cat" / "a" / "3.png").write_bytes(b"none")
    rows = [f"photos/{file},{file[:3]}" for file in files]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    options = ("--on-error", "skip", "--size", "8", "--shots", "3")
    utilgen("pack", source, *options, "-o", "real")
    utilgen("pack", source, *options, "--without", "real", "-o", "val")
    done = utilgen(
        "pack", source, *options[:4], "--without", "real", "--without", "val", "-o", "test"
    )
    assert b"of 2 classes: cat, dog\n" in done.stderr
    parts = [
        {
            (s.facts["class_name"], s.facts["path"])
            for s in open_source([str(tmp_path / p)]).samples()
        }
        for p in ("real", "val", "test")
    ]
    assert [len(part) for part in parts] == [6, 6, 7]
    assert len(set.union(*parts)) == 19
    assert utilgen("pack", source, *options, "--without", "real", "-o", "val").returncode == 0
    gone = utilgen("pack", source, *options, "--without", "test", "-o", "val", check=False)
    assert gone.returncode == 2 and b"without was" in gone.stderr


def test_shards_that_nothing_is_left_without_are_refused(utilgen: Run, tmp_path: Path) -> None:
    photos(tmp_path, *(f"{folder}/cat/{name}.png" for folder, name in (("a", 1), ("b", 2))))
    utilgen("pack", "a", "-o", "shards")
    photos(tmp_path, "c/cat/1.png", "c/cat/2.png")
    utilgen("pack", "c", "-o", "both")
    (tmp_path / "c" / "cat" / "1.png").unlink()
    done = utilgen("pack", "c", "--without", "both", "-o", "more", check=False)
    assert done.returncode == 65 and b"'1.png' of class cat is not in c" in done.stderr
    for folder, why in (
        ("a", b"class cat: has no images but"),
        ("b", b"'1.png' of class cat is not in b"),
    ):
        done = utilgen("pack", folder, "--without", "shards", "-o", "more", check=False)
        assert done.returncode == 65 and why in done.stderr
    utilgen("generate", "-m", "tiny", "--smoke", "-o", "drawn")
    done = utilgen("pack", "a", "--without", "drawn", "-o", "more", check=False)
    assert done.returncode == 65 and b"which path it was packed from" in done.stderr


def test_the_folder_that_one_stands_in_is_divided(utilgen: Run, tmp_path: Path) -> None:
    """The shards lie in it, and are no class."""
    photos(tmp_path, *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(3)))
    utilgen("pack", ".", "--shots", "2", "-o", "real")
    done = utilgen("pack", ".", "--without", "real", "-o", "val")
    assert b"packed 2 images of 2 classes: cat, dog" in done.stderr
