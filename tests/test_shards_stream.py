"""The stream contract: what is written is read everywhere, and a broken stream is never whole."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st

from utilgen_cli.runtime.errors import BadInput, NoInput, UsageError
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.check import check_shards
from utilgen_cli.shards.operands import Source, expand_braces, open_source, parse_part
from utilgen_cli.shards.reader import read_tar
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.writer import stats_path, tar_member, write_shard

from .conftest import ROOT, make_sample, tar_bytes

keys = st.from_regex(
    r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}(/[A-Za-z0-9][A-Za-z0-9_-]{0,20})?", fullmatch=True
)
members = st.dictionaries(
    st.sampled_from(["png", "cls", "json", "utility.json", "txt", "npy"]),
    st.binary(max_size=1500),
    min_size=1,
)
sample_lists = st.dictionaries(keys, members, max_size=6).map(
    lambda found: [Sample(key, data) for key, data in found.items()]
)


def read_all(data: bytes) -> list[Sample]:
    return list(read_tar(io.BytesIO(data), "test.tar"))


@given(sample_lists)
@settings(max_examples=60, deadline=None)
def test_samples_come_back_byte_for_byte_and_in_order(samples: list[Sample]) -> None:
    back = read_all(tar_bytes(samples))
    assert [(s.key, list(s.members.items())) for s in back] == [
        (s.key, list(s.members.items())) for s in samples
    ]
    assert tar_bytes(back) == tar_bytes(samples)


@given(sample_lists)
@settings(max_examples=30, deadline=None)
def test_tarfile_reads_the_same_members(samples: list[Sample]) -> None:
    with tarfile.open(fileobj=io.BytesIO(tar_bytes(samples))) as tar:
        theirs = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert theirs == [(f"{s.key}.{n}", d) for s in samples for n, d in s.members.items()]


@given(sample_lists.filter(len), st.data())
@settings(max_examples=60, deadline=None)
def test_every_cut_is_found(samples: list[Sample], data: st.DataObject) -> None:
    whole = tar_bytes(samples)
    end = max(i for i in range(0, len(whole), 512) if any(whole[i : i + 512])) + 512
    cut = data.draw(st.integers(0, end + 1023))  # anywhere before the end mark is complete
    with pytest.raises(BadInput, match="test"):
        read_all(whole[:cut])


def test_a_cut_between_members_is_found_where_tarfile_sees_a_clean_end() -> None:
    one, two = tar_bytes([make_sample(1)]), tar_bytes([make_sample(1), make_sample(2)])
    boundary = max(i for i in range(0, len(one), 512) if any(one[i : i + 512])) + 512
    cut = two[:boundary]
    with tarfile.open(fileobj=io.BytesIO(cut)) as tar:
        assert len(tar.getmembers()) == 3  # no complaint
    with pytest.raises(BadInput, match="end mark is missing"):
        read_all(cut)


def test_complete_concatenated_archives_are_read_on() -> None:
    both = tar_bytes([make_sample(1)]) + tar_bytes([make_sample(2)])
    assert [s.key for s in read_all(both)] == ["0000-000001", "0000-000002"]


def test_tars_of_other_writers_are_read(tmp_path: Path) -> None:
    sample = make_sample(1)
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=form) as tar:
            for name, data in sample.members.items():
                info = tarfile.TarInfo(f"./{sample.key}.{name}")
                info.size, info.mtime = len(data), 1.5  # a float mtime makes a pax header
                if form != tarfile.PAX_FORMAT:
                    info.mtime = 1
                tar.addfile(info, io.BytesIO(data))
        assert read_all(out.getvalue())[0].members == sample.members
    with wds.TarWriter(str(tmp_path / "w.tar")) as writer:
        writer.write({"__key__": "a1", "cls": "3", "json": {"x": 1}})
    [back] = open_source([str(tmp_path / "w.tar")]).samples()
    assert (back.key, back.label, back.facts) == ("a1", 3, {"x": 1})


def test_what_a_foreign_sample_lacks_is_told_with_what_it_has() -> None:
    lower, upper = Sample("a", {"txt": b"a dog", "json": b"{}"}), Sample("b", {"JPG": b"x"})
    with pytest.raises(BadInput, match="no cls member, only txt, json"):
        _ = lower.label
    with pytest.raises(BadInput, match=r"no image member \(.*\), only JPG"):
        _ = upper.image
    with pytest.raises(BadInput, match="only m0, m1, m2, m3, m4, m5 and others"):
        _ = Sample("c", {f"m{i}": b"" for i in range(9)}).label


@pytest.mark.parametrize("packed", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_tar_is_called_that(packed: Callable[[bytes], bytes]) -> None:
    with pytest.raises(BadInput, match=r"is compressed by .*Unpack it first"):
        read_all(packed(tar_bytes([make_sample(i) for i in range(9)])))


def test_a_bad_key_is_told_with_its_member() -> None:
    with pytest.raises(BadInput, match=r"member '\./\._a\.jpg': bad key"):
        read_all(tar_member("./._a.jpg", b"x") + bytes(1024))


def test_webdataset_makes_foreign_shards_ours_as_the_page_shows(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "streams.md").read_text()
    program = page.split("```python\nimport webdataset")[1].split("```")[0]
    texts = {"a dog": b"photo", "a cat": b"other photo"}
    foreign = b"".join(
        tar_member(f"photo {number}.{kind}", data)
        for number, (text, photo) in enumerate(texts.items())
        for kind, data in (("JPG", photo), ("txt", text.encode()))
    )
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "0.tar.gz").write_bytes(gzip.compress(foreign + bytes(1024)))
    subprocess.run([sys.executable, "-c", f"import webdataset{program}"], cwd=tmp_path, check=True)
    back = list(open_source([str(tmp_path / "ours")]).samples())
    assert [(s.label, s.facts["class_name"]) for s in back] == [(1, "dog"), (0, "cat")]
    assert [s.image for s in back] == [("jpg", data) for data in texts.values()]


def test_gnu_tar_lists_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_bytes([make_sample(1), make_sample(2)]))
    listed = subprocess.run(["tar", "tf", tmp_path / "a.tar"], capture_output=True, check=True)
    assert listed.stderr == b""
    assert listed.stdout.split() == [
        f"0000-00000{i}.{n}".encode() for i in (1, 2) for n in ("png", "cls", "json")
    ]


def test_webdataset_reads_shards_with_two_workers(tmp_path: Path) -> None:
    for shard in range(2):
        write_shard(
            tmp_path / f"{shard:05d}.tar", [make_sample(10 * shard + i, i % 2) for i in range(5)]
        )
    urls = [str(p) for p in sorted(tmp_path.glob("*.tar"))]
    data = wds.WebDataset(
        urls, shardshuffle=False, nodesplitter=wds.split_by_node, empty_check=False
    )
    data = data.decode("torchrgb").to_tuple("__key__", "png", "cls", "json")
    loaded = list(torch.utils.data.DataLoader(data, batch_size=None, num_workers=2))
    assert sorted(k for k, *_ in loaded) == sorted(
        s.key for s in open_source([str(tmp_path)]).samples()
    )
    assert all(
        image.shape == (3, 8, 8) and facts["class_name"] == f"class {c}"
        for _, image, c, facts in loaded
    )


@pytest.mark.parametrize(
    "name", ["../x.png", "/etc/x.png", "a b.png", "x", "ä.png", "$(touch x).png", ".png"]
)
def test_hostile_names_are_refused(name: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(BadInput):
        read_all(out.getvalue())


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE]
)
def test_links_and_devices_are_refused(kind: bytes) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    with pytest.raises(BadInput, match="link"):
        read_all(info.tobuf() + bytes(1024))


@given(st.binary(max_size=4096))
@settings(max_examples=150, deadline=None)
def test_noise_gives_only_our_own_error(data: bytes) -> None:
    with pytest.raises(BadInput):
        read_all(data + b"x")


@given(st.integers(0, 147), st.integers(1, 255))
@settings(max_examples=150, deadline=None)
def test_a_changed_byte_of_name_size_or_time_is_found(at: int, change: int) -> None:
    whole = bytearray(tar_bytes([make_sample(1)]))
    whole[at] ^= change
    with pytest.raises(BadInput):
        read_all(bytes(whole))


def test_a_failing_stage_leaves_no_shard_and_no_temporary_file(tmp_path: Path) -> None:
    def failing():  # type: ignore[no-untyped-def]
        yield make_sample(1)
        raise ValueError("no")

    with pytest.raises(ValueError):
        write_shard(tmp_path / "00000.tar", failing())
    assert list(tmp_path.iterdir()) == []


def test_the_same_samples_give_the_same_bytes_and_checksums(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shard(tmp_path / f"{name}.tar", [make_sample(i) for i in range(3)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    stats = json.loads(stats_path(tmp_path / "a.tar").read_text())
    sums = subprocess.run(
        ["sha256sum", tmp_path / "a.tar"], capture_output=True, text=True, check=True
    )
    assert stats["sha256"] == sums.stdout.split()[0]
    assert stats["samples"] == 3


def test_check_finds_a_flipped_bit_a_cut_and_a_repeated_key(tmp_path: Path) -> None:
    for shard in range(4):
        write_shard(tmp_path / f"{shard:05d}.tar", [make_sample(shard * 3 + i) for i in range(3)])
    assert check_shards([tmp_path]).broken == []
    flipped = bytearray((tmp_path / "00001.tar").read_bytes())
    flipped[600] ^= 1  # inside the first picture
    (tmp_path / "00001.tar").write_bytes(flipped)
    whole = (tmp_path / "00002.tar").read_bytes()
    (tmp_path / "00002.tar").write_bytes(whole[: len(whole) // 2 // 512 * 512])
    write_shard(tmp_path / "00003.tar", [make_sample(0)])
    broken = [Path(row["shard"]).name for row in check_shards([tmp_path]).broken]
    assert broken == ["00001.tar", "00002.tar", "00003.tar"]
    assert check_shards([tmp_path], remove=True).removed == 2
    left = sorted(p.name for p in tmp_path.glob("*.tar"))
    assert left == ["00000.tar", "00003.tar"]  # nothing is deleted for a key that stands twice


def test_a_directory_that_may_not_be_read_is_an_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(NoInput, match=rf"{tmp_path}: Permission denied. Check its rights"):
        open_source([str(tmp_path)])


def test_operands(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar"):
        (tmp_path / name).write_bytes(tar_bytes([make_sample(ord(name[0]))]))
    (tmp_path / "notes.txt").write_text("no shard")
    assert [p.name for p in open_source([str(tmp_path)]).paths] == ["a.tar", "b.tar"]
    assert [p.name for p in open_source([f"{tmp_path}/{{a,b}}.tar"]).part("1/2").paths] == ["b.tar"]
    with pytest.raises(NoInput, match="no such file"):
        open_source([str(tmp_path / "missing")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoInput, match="shard in it"):
        open_source([str(tmp_path / "empty")])
    with pytest.raises(UsageError):
        open_source(["-", "a.tar"])
    assert expand_braces("x/{008..011}.tar") == [f"x/{i:03d}.tar" for i in range(8, 12)]


@pytest.mark.parametrize(
    "pattern",
    [
        "{a,b{1,2}}.tar",
        "run{1}/{000..002}.tar",
        "a{1..010}.tar",
        "{a..c}.tar",
        "x{.tar",
        "a}b{1,2}.tar",
        "x{y{1..2}",
        "{2..0}",
    ],
)
def test_braces_are_expanded_as_bash_expands_them(pattern: str) -> None:
    echo = subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, check=True)
    assert expand_braces(pattern) == echo.stdout.decode().split()


@pytest.mark.parametrize("spec", ["1", "2/2", "-1/2", "x/y", "0/0", "rank"])
def test_bad_parts_are_refused(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UsageError):
        parse_part(spec)


@given(st.integers(1, 7), st.integers(0, 20))
def test_parts_cover_every_shard_once(count: int, shards: int) -> None:
    source = Source(tuple(Path(f"{i}.tar") for i in range(shards)))
    parts = [source.part(f"{i}/{count}").paths for i in range(count)]
    assert sorted(p for part in parts for p in part) == sorted(source.paths)


def test_nan_is_never_written() -> None:
    with pytest.raises(ValueError):
        encode_json({"utility": float("nan")})
