"""The short forms of the campaigns on damaged input, numbers, checkpoints and pipes (tests/faults/)."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from utilgen_cli.commands.streams import run_source
from utilgen_cli.runtime.checkpoint import load_checkpoint, save_checkpoint, save_tensors
from utilgen_cli.runtime.errors import BadInput, UtilgenError
from utilgen_cli.shards.check import check_shards
from utilgen_cli.shards.images import decode_many, decode_rgb
from utilgen_cli.shards.operands import open_source
from utilgen_cli.shards.quarantine import Quarantine
from utilgen_cli.shards.sample import BadSample, Sample
from utilgen_cli.shards.writer import write_shard, write_tar

from .conftest import Run, make_sample, tar_bytes
from .faults import fuzz
from .faults.damage import hurt_all
from .faults.numbers import tear
from .faults.odd import odd_images, odd_samples
from .faults.pipes import cut


def test_every_blow_is_found_located_and_is_bad_input(tmp_path: Path) -> None:
    for kind, count in hurt_all(tmp_path, 100, seed=1).items():
        assert count["found"] == count["located"] == count["code 65"] == count["shards"], kind
    assert len(check_shards([tmp_path / "hurt"]).broken) == 100


def test_odd_images_are_converted_or_left_out_for_a_reason() -> None:
    for name, (kind, data, reason) in odd_images().items():
        quarantine = Quarantine(skip=True)
        sample = Sample("a", {kind: data, "cls": b"0"})
        passed = list(quarantine.screen([sample]))
        assert quarantine.reasons == ({} if reason is None else {reason: 1}), name
        assert passed == ([sample] if reason is None else []), name
        if reason is None:
            assert decode_rgb(sample, 8).shape == (8, 8, 3)


def test_threads_decode_to_the_same_and_the_first_bad_image_is_told() -> None:
    good = [Sample(n, {k: d}) for n, (k, d, reason) in odd_images().items() if reason is None]
    bad = [Sample(n, {k: d}) for n, (k, d, reason) in odd_images().items() if reason]
    filters = list(warnings.filters)
    together = decode_many(8 * good, 8, threads=3)
    assert all(map(np.array_equal, together, (decode_rgb(s, 8) for s in 8 * good)))
    for threads in (1, 3):
        with pytest.raises(BadSample, match=bad[0].key):
            decode_many([*good, *bad], 8, threads)
    assert warnings.filters == filters


def test_sixteen_bits_keep_their_brightness_and_cmyk_its_colour() -> None:
    images = odd_images()
    grey, plain = (decode_rgb(Sample("a", dict([images[n][:2]]))) for n in ("16-bit grey", "grey"))
    red = decode_rgb(Sample("a", dict([images["palette"][:2]])))[..., :1]
    assert abs(grey[..., :1].astype(int) - red).mean() < 40  # the grey is the red channel
    assert plain.dtype == grey.dtype
    cmyk = decode_rgb(Sample("a", dict([images["cmyk"][:2]]))).astype(int)
    assert abs(cmyk - decode_rgb(Sample("a", dict([images["palette"][:2]])))).mean() < 60


def test_a_dark_picture_of_sixteen_bits_stays_dark() -> None:
    out = io.BytesIO()
    Image.fromarray(np.full((8, 8), 200, np.uint16)).save(out, "PNG")
    assert decode_rgb(Sample("a", {"png": out.getvalue()})).max() <= 1


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description rdf:about=""
xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


def turned_by(how: str) -> dict[str, Any]:
    """What says that a picture was taken on its side: Exif, Exif of which another tag makes no
    sense (a resolution as text), or XMP."""
    if how == "xmp":
        return {"xmp": XMP}
    exif = Image.Exif()
    exif[0x0112] = 6
    if how == "exif":
        return {"exif": exif}
    entries = [
        struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0),
        struct.pack("<HHI4s", 0x011A, 2, 3, b"72"),
    ]
    body = struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4)
    return {"exif": b"Exif\0\0II*\0\x08\0\0\0" + body}


@pytest.mark.parametrize("how", ["exif", "bad exif", "xmp"])
def test_a_photograph_is_turned_as_the_camera_was_held(how: str) -> None:
    rgb = np.zeros((40, 60, 3), np.uint8)
    rgb[:10] = 255  # the top of what the sensor saw is the right side of the picture
    out = io.BytesIO()
    Image.fromarray(rgb).save(out, "JPEG", quality=95, **turned_by(how))
    sample = Sample("0000-000000", {"jpg": out.getvalue(), "cls": b"0"})
    upright = decode_rgb(sample)
    assert upright.shape == (60, 40, 3)
    assert upright[:, 32:].mean() > 250 > 5 > upright[:, :28].mean()
    assert decode_rgb(sample, 8)[:, 7].mean() > 200


def test_skip_leaves_bad_samples_out_counts_them_and_says_so(utilgen: Run, tmp_path: Path) -> None:
    good = [make_sample(i, size=24).with_member("utility.json", b'{"utility": %f}' % (i / 20)) for i in range(20)]  # fmt: skip
    odd = odd_samples(["class 0"])
    (tmp_path / "a.tar").write_bytes(tar_bytes([*good[:9], *(s for s, _ in odd), *good[9:]]))
    expected = Counter(reason for _, reason in odd if reason is not None)
    done = utilgen("pairs", "a.tar", "-o", "pairs", "--on-error", "skip", "--json", "-q")
    said, summary = done.stderr.decode().strip().splitlines()
    found = json.loads(summary)["quarantined"]
    assert found["reasons"] == expected
    assert found["samples"] == len(found["where"]) == expected.total()
    assert f"left out {expected.total()} bad samples" in said
    assert all("a.tar at byte" in where for where in found["where"])
    stop = utilgen("view", "a.tar", "-o", "page.html", check=False)
    assert (stop.returncode, stop.stderr.count(b"\n")) == (65, 1)
    assert b"sample 0000-0009" in stop.stderr


def test_skip_never_skips_damage_of_the_stream(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [make_sample(i) for i in range(3)])
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[:2048])
    with pytest.raises(BadInput, match=r"at byte 2048, after 0000-000000"):
        list(open_source([str(tmp_path)], Quarantine(skip=True)).samples())
    flipped = bytearray(whole)
    flipped[600] ^= 1  # a picture
    (tmp_path / "a.tar").write_bytes(flipped)
    quarantine = Quarantine(skip=True)
    kept = list(open_source([str(tmp_path)], quarantine).samples())
    assert len(kept) == 2
    assert quarantine.reasons == {"not as written": 1}


def test_a_rerun_remakes_the_broken_shards_and_no_others(tmp_path: Path) -> None:
    def draw(part: list[int]) -> list[Sample]:
        return [make_sample(i) for i in part]

    def run() -> None:
        run_source(draw, range(9), str(tmp_path / "out"), "generate", {}, shard_size=3)  # type: ignore[arg-type]

    run()
    shards = sorted((tmp_path / "out").glob("*.tar"))
    before = {p: (p.stat().st_ino, p.read_bytes()) for p in shards}
    flipped = bytearray(before[shards[1]][1])
    flipped[700] ^= 8
    shards[1].write_bytes(flipped)
    shards[2].unlink()
    run()
    assert [p.read_bytes() for p in shards] == [data for _, data in before.values()]
    assert [p.stat().st_ino == before[p][0] for p in shards[:2]] == [True, False]


@pytest.mark.parametrize("kind", ["tar", "json", "png", "jpg", "webp"])
def test_fuzzed_files_give_our_own_errors_only(kind: str, tmp_path: Path) -> None:
    samples = [make_sample(i, size=16).with_member("utility.json", b'{"utility": 0.%d}' % i) for i in range(4)]  # fmt: skip
    if kind in ("tar", "json"):
        write_shard(tmp_path / "00000.tar", samples)
        name = "00000_stats.json"
        if kind == "tar":
            (tmp_path / name).unlink()
            name = "00000.tar"
        subject = fuzz.Subject(tmp_path, name, lambda p: fuzz.read_shards(p.parent))
    else:
        from PIL import Image

        Image.open(io.BytesIO(samples[0].members["png"])).save(tmp_path / f"a.{kind}")
        subject = fuzz.Subject(tmp_path, f"a.{kind}", fuzz.decode)
    outcomes, _, _ = fuzz.fuzz_subject(subject, 60, "short")
    assert not set(outcomes) - {"read", "refused"}
    assert outcomes["refused"] > 10


def test_a_torn_checkpoint_falls_back_fifty_times_of_fifty(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    for number in range(50):
        for step in (1, 2):
            save_checkpoint(path, {"x": torch.full((50,), float(step))}, {"step": step})
        tear(path, random.Random(number))
        found = load_checkpoint(path)
        assert found is not None
        assert found[1] == {"step": 1}
        assert found[0]["x"].tolist() == [1.0] * 50


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_file_of_weights_holds_what_is_not_finite(bad: float, tmp_path: Path) -> None:
    with pytest.raises(UtilgenError, match="not finite"):
        save_tensors(tmp_path / "w.safetensors", {"w": torch.tensor([1.0, bad])})
    assert not list(tmp_path.iterdir())


def test_a_model_that_draws_nan_writes_no_image(tmp_path: Path) -> None:
    from utilgen_cli.diffusion.generate import GenerateConfig, Generator

    from .faults.numbers import poison
    from .random_bundle import make_bundle

    bundle = make_bundle(tmp_path / "bundle")
    poison(bundle / "vae" / "diffusion_pytorch_model.safetensors", float("nan"))
    generator = Generator(
        GenerateConfig(str(bundle), steps=1), device=torch.device("cpu"), dtype=torch.float32
    )
    with pytest.raises(UtilgenError, match="NaN"):
        list(generator.draw([(0, 0)]))


def _stream(path: Path) -> Path:
    scored = [make_sample(i, size=16).with_member("utility.json", b'{"utility": 0.%d}' % i) for i in range(9)]  # fmt: skip
    with path.open("wb") as f:
        write_tar(scored, f)
    return path


@pytest.mark.parametrize(
    ("second", "failure"),
    [("pairs -o out", "between samples"), ("pairs", "without its end mark"),
     ("view -o page.html", "between members"), ("pairs", "before any output")],
)  # fmt: skip
def test_a_failing_first_stage_leaves_nothing_that_looks_whole(
    second: str, failure: str, bash: Run, tmp_path: Path
) -> None:
    broken = cut(_stream(tmp_path / "whole.tar"), failure, random.Random(0))
    (tmp_path / "broken.tar").write_bytes(broken)
    script = f"(cat broken.tar; exit 1) | utilgen {second} -q > result; echo $? ${{PIPESTATUS[1]}}"
    done = bash(script)
    assert done.stdout == b"65 65\n"
    assert not list(tmp_path.glob("out/*.tar")) and not (tmp_path / "page.html").exists()
    with pytest.raises(BadInput):
        list(open_source([str(tmp_path / "result")]).samples())


def test_a_stream_into_a_full_device_is_one_line(bash: Run, tmp_path: Path) -> None:
    done = bash("utilgen pairs whole.tar -q > /dev/full; echo $?", env={"P": str(_stream(tmp_path / "whole.tar"))})  # fmt: skip
    assert done.stdout == b"1\n"
    assert done.stderr.count(b"\n") == 1
    assert b"no space left" in done.stderr
