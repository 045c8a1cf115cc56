"""pairs: what every strategy keeps to, and what each is for."""

from __future__ import annotations

import io
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utilgen_cli.runtime.errors import BadInput, UsageError
from utilgen_cli.runtime.files import encode_json
from utilgen_cli.shards.images import encode_image
from utilgen_cli.shards.parquet import write_pickapic
from utilgen_cli.shards.sample import Sample
from utilgen_cli.shards.scores import pack_features, unpack_features
from utilgen_cli.valuation.pair_strategies import STRATEGIES, distinct_rows
from utilgen_cli.valuation.pairing import ClassPairs, PairingConfig, PairingReport, pair_samples

from .conftest import Run, tar_bytes


def picture(seed: int) -> np.ndarray:
    """Blocks of random grey: pictures of two seeds are far apart."""
    blocks = np.random.default_rng(seed).integers(0, 256, (8, 8, 1), dtype=np.uint8)
    return blocks.repeat(2, 0).repeat(2, 1).repeat(3, 2)


def scored(
    key: str, utility: float, label: int = 0, rgb: np.ndarray | None = None, prompt: str = "p",
    predicted: int = 0,
) -> Sample:  # fmt: skip
    rgb = picture(zlib.crc32(key.encode())) if rgb is None else rgb
    return Sample(
        key,
        {
            "png": encode_image(rgb),
            "cls": str(label).encode(),
            "json": encode_json({"class_name": f"class {label}", "prompt": prompt, "model": "m"}),
            "utility.json": encode_json({"utility": utility, "predicted": predicted}),
        },
    )


def pair(samples: list[Sample], **config: object) -> tuple[list[Sample], PairingReport]:
    report = PairingReport()
    made = pair_samples(samples, PairingConfig(**config), report)  # type: ignore[arg-type]
    return list(made), report


def test_sets_that_count_alike_give_pairs_with_keys_of_their_own() -> None:
    """Two rounds of `generate` both begin at 0000-000000."""
    rounds = [
        [scored(f"0000-{i:06d}", i / 8, 0, picture(10 * r + i)) for i in range(8)] for r in (0, 1)
    ]
    made, _ = pair([*rounds[0], *rounds[1]])
    keys = [sample.key for sample in made]
    assert sorted(keys) == ["0000-000006", "0000-000006-2", "0000-000007", "0000-000007-2"]
    assert [sample.facts["win_key"] for sample in made] == [key[:11] for key in keys]


pools = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(["a", "b"]), st.floats(0, 1)),
    min_size=1,
    max_size=24,
)
configs = st.fixed_dictionaries(
    {
        "strategy": st.sampled_from(sorted(STRATEGIES)),
        "quantile": st.floats(0.01, 0.5),
        "min_margin": st.sampled_from([0.0, 0.1, 0.5]),
        "max_per_class": st.sampled_from([None, 1, 3]),
        "seed": st.integers(0, 3),
    }
)


@settings(max_examples=60, deadline=None)
@given(pools, configs)
def test_what_every_pair_keeps_to(pool: list[tuple[int, str, float]], config: dict) -> None:
    samples = [
        scored(f"k{i:03d}", utility, label, picture(i), prompt)
        for i, (label, prompt, utility) in enumerate(pool)
    ]
    by_key = {s.key: s for s in samples}
    made, report = pair(samples, **config)
    used = []
    for found in made:
        facts = found.facts
        win, lose = by_key[facts["win_key"]], by_key[facts["lose_key"]]
        used += [win.key, lose.key]
        assert found.key == win.key
        assert list(found.members) == ["win.png", "lose.png", "cls", "json"]
        assert found.members["win.png"] == win.members["png"]
        assert found.members["lose.png"] == lose.members["png"]
        assert win.label == lose.label == found.label
        assert win.facts["prompt"] == lose.facts["prompt"] == facts["prompt"]
        margin = win.parsed("utility.json")["utility"] - lose.parsed("utility.json")["utility"]
        assert margin > 0 and margin >= config["min_margin"]
        assert facts["win_utility"] - facts["lose_utility"] == margin
    assert len(used) == len(set(used))
    assert sum(c.pairs for c in report.classes.values()) == len(made)
    assert sum(c.samples for c in report.classes.values()) == len(samples)
    for label, summary in report.classes.items():
        count = sum(found.label == label for found in made)
        assert count == summary.pairs <= (config["max_per_class"] or 999)
        assert bool(summary.why_none) == (count == 0)
    assert tar_bytes(made) == tar_bytes(pair(samples, **config)[0])


def test_top_bottom_takes_the_ends_and_the_widest_first() -> None:
    samples = [scored(f"k{i}", i / 10, rgb=picture(i)) for i in (3, 9, 1, 7, 0, 5, 2, 8)]
    made, _ = pair(samples, quantile=0.25)
    assert [(s.facts["win_key"], s.facts["lose_key"]) for s in made] == [("k9", "k0"), ("k8", "k1")]


def test_nearest_matches_pictures_and_top_bottom_does_not() -> None:
    """Ten poses, each once of high and once of low utility; a little noise on each picture."""
    rng = np.random.default_rng(0)
    samples = []
    for pose in range(10):
        for side in (0, 1):
            rgb = np.clip(picture(pose) + rng.integers(-20, 20, (16, 16, 1)), 0, 255).astype(
                np.uint8
            )
            utility = float(side + rng.random()) / 2
            samples.append(scored(f"pose{pose}-{side}", utility, rgb=rgb))

    def same_pose(strategy: str) -> int:
        made, _ = pair(samples, strategy=strategy, quantile=0.5)
        assert len(made) == 10
        return sum(s.facts["win_key"][:5] == s.facts["lose_key"][:5] for s in made)

    assert same_pose("nearest") == 10
    assert same_pose("top-bottom") < 5


def posed(seed: int = 0) -> list[Sample]:
    """Twelve samples whose pictures say nothing; `features` put high with low by number."""
    rng = np.random.default_rng(seed)
    directions = rng.standard_normal((6, 40)).astype(np.float32)
    samples = []
    for number in range(6):
        for side in (0, 1):
            row = directions[number] + 0.1 * rng.standard_normal(40)
            (packed,) = pack_features(row[None])
            made = scored(f"pose{number}-{side}", side / 2 + rng.random() / 4)
            score = made.parsed("utility.json") | {"features": packed}
            samples.append(made.with_member("utility.json", encode_json(score)))
    return samples


def matches(made: list[Sample]) -> int:
    return sum(s.facts["win_key"][:5] == s.facts["lose_key"][:5] for s in made)


def test_nearest_matches_the_features_of_the_value_model() -> None:
    made, report = pair(posed(), strategy="nearest", quantile=0.5)
    assert matches(made) == len(made) == 6
    assert "matched by the value model's features" in report.lines()[0]
    made, report = pair(posed(), strategy="nearest", quantile=0.5, match="grey")
    assert matches(made) < 5 and report.matched_by == "grey"
    bare = scored("bare", 0.9)
    assert pair([*posed(), bare], strategy="nearest")[1].matched_by == "grey"
    with pytest.raises(BadInput, match="value score"):
        pair([*posed(), bare], strategy="nearest", match="value")


def test_nearest_matches_what_clip_says() -> None:
    """Here a stand-in for CLIP that looks at one pixel; the pictures of a pose share it."""
    samples = []
    for number in range(6):
        for side in (0, 1):
            rgb = picture(100 + 2 * number + side)
            rgb[0, 0] = 40 * number
            samples.append(scored(f"pose{number}-{side}", side / 2 + number / 100, rgb=rgb))

    def pixel(images: list[np.ndarray]) -> np.ndarray:
        return np.stack([image[0, 0, :1].astype(np.float32) for image in images])

    config = PairingConfig("nearest", quantile=0.5, match="clip")
    made = list(pair_samples(samples, config, describe=pixel))
    assert matches(made) == len(made) == 6


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 200), st.integers(0, 9))
def test_packed_features_keep_their_distances(width: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((2, width)).astype(np.float32)
    a, b = (unpack_features(text) for text in pack_features(rows))
    assert len(a) == min(width, 64)
    ratio = np.linalg.norm(a - b) / np.linalg.norm(rows[0] - rows[1])
    assert ratio == pytest.approx(1, abs=0.01 if width <= 64 else 0.45)


def test_random_margin_pairs_depend_on_the_seed_and_use_what_they_can() -> None:
    samples = [scored(f"k{i:02d}", i / 40, rgb=picture(i)) for i in range(40)]
    made, _ = pair(samples, strategy="random-margin", min_margin=0.2)
    assert len(made) >= 14
    other, _ = pair(samples, strategy="random-margin", min_margin=0.2, seed=1)
    assert {s.key for s in made} != {s.key for s in other} or tar_bytes(made) != tar_bytes(other)


def near_copy(rgb: np.ndarray, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-2, 3, rgb.shape)
    return np.clip(rgb + noise, 0, 255).astype(np.uint8)


def test_agreement_pairs_what_is_seen_as_its_class_with_what_is_not() -> None:
    seen = [scored(f"s{i}", 0.5 + i / 100) for i in range(9)]
    other = [scored(f"o{i}", i / 100, predicted=1) for i in range(6)]
    made, report = pair([*seen, *other], strategy="agreement")
    assert report.classes[0].pairs == 6
    assert {s.facts["win_key"][0] for s in made} == {"s"}
    assert {s.facts["lose_key"] for s in made} == {s.key for s in other}
    assert [s.facts["win_key"] for s in made] != [f"s{i}" for i in (8, 7, 6, 5, 4, 3)]
    assert tar_bytes(made) != tar_bytes(pair([*seen, *other], strategy="agreement", seed=1)[0])
    alike, report = pair(seen, strategy="agreement")
    assert not alike and "sees all of its samples" in report.classes[0].why_none


@pytest.mark.parametrize("features", [[1.0, 2.0], "!", {"a": 1}])
def test_features_of_another_kind_are_bad_input(features: object) -> None:
    score = {"utility": 0.5, "features": features}
    odd = scored("a", 0.5).with_member("utility.json", encode_json(score))
    with pytest.raises(BadInput, match="not those of the others"):
        pair([odd, scored("b", 0.6)], strategy="nearest", match="value", quantile=0.5)


def test_agreement_needs_to_know_what_was_predicted() -> None:
    bare = scored("a", 0.5).with_member("utility.json", encode_json({"utility": 0.5}))
    with pytest.raises(BadInput, match="which class was predicted"):
        pair([scored("b", 0.6), bare], strategy="agreement")


@pytest.mark.parametrize("strategy", sorted(STRATEGIES))
def test_copies_and_near_copies_of_a_picture_win_once(strategy: str) -> None:
    star = picture(999)
    copies = [scored(f"exact{i}", 0.99, rgb=star) for i in range(10)]
    copies += [scored(f"near{i}", 0.98 + i / 1000, rgb=near_copy(star, i)) for i in range(10)]
    others = [scored(f"k{i:02d}", i / 40, rgb=picture(i), predicted=int(i < 12)) for i in range(20)]
    made, report = pair(copies + others, strategy=strategy, quantile=0.5)
    assert sum(not s.facts["win_key"].startswith("k") for s in made) == 1
    assert report.classes[0].duplicates == 19


def test_a_jpeg_of_the_same_picture_is_the_same_picture() -> None:
    """Smooth pictures, where JPEG is close to what it was given."""
    rows = []
    for seed in range(40):
        small = (
            Image.fromarray(picture(seed)).resize((8, 8)).resize((64, 64), Image.Resampling.BICUBIC)
        )
        out = io.BytesIO()
        small.save(out, "JPEG", quality=80)
        for image in (small, Image.open(out)):
            grey = np.asarray(image.convert("RGB").resize((8, 8)), np.float64).mean(2)
            rows.append(grey.round().astype(np.uint8).ravel())
    assert distinct_rows(np.stack(rows)).tolist() == [True, False] * 40


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        ([scored("a", 0.5)], "one sample"),
        ([scored("a", 0.5), scored("b", 0.5)], "all equal"),
        ([scored("a", 0.5, prompt="x"), scored("b", 0.9, prompt="y")], "another prompt"),
        ([scored("a", 0.5, rgb=picture(1)), scored("b", 0.9, rgb=picture(1))], "all the same"),
        ([scored("a", 0.55), scored("b", 0.5)], "differ by 0.05"),
    ],
)
def test_a_class_without_pairs_says_why(samples: list[Sample], why: str) -> None:
    _, report = pair([*samples, scored("x", 0.1, 1), scored("y", 0.9, 1)], min_margin=0.1)
    lines = report.lines()
    told = "1 pairs in 1 of 2 classes (class 1 1); winners' utility 0.8 higher on average"
    assert lines[0] == told
    assert lines[1].startswith("no pair in class 0: ") and why in lines[1]
    assert why in report.as_dict()["classes"]["0"]["why_none"]


def test_classes_take_turns_so_that_a_prefix_is_balanced() -> None:
    samples = [
        scored(f"{c}-{i}", i / 10, c, picture(10 * c + i)) for c in (0, 1, 2) for i in range(8)
    ]
    made, _ = pair(samples, quantile=0.25)
    assert [s.label for s in made] == [0, 1, 2, 0, 1, 2]


def test_pickapic_has_the_columns_of_public_scripts() -> None:
    made, _ = pair([scored("a", 0.5), scored("b", 0.9)], layout="pickapic")
    assert made[0].members == {
        "jpg_0": scored("b", 0.9).members["png"], "jpg_1": scored("a", 0.5).members["png"],
        "label_0": b"1", "caption": b"p",
    }  # fmt: skip


def test_public_scripts_read_parquet(utilgen: Run, tmp_path: Path) -> None:
    samples = [scored(f"{i}", i / 10) for i in range(4)]
    (tmp_path / "scored.tar").write_bytes(tar_bytes(samples))
    line = ("pairs", "scored.tar", "--quantile", "0.5", "-o", "out/pairs.parquet", "-q")
    refused = utilgen(*line, check=False)
    assert (refused.returncode, refused.stderr.count(b"\n")) == (2, 1)
    assert b"--layout pickapic" in refused.stderr
    utilgen(*line, "--layout", "pickapic")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pairs.parquet"]
    table = pyarrow.parquet.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    image = {s.key: s.members["png"] for s in samples}
    expected = [("3", "0"), ("2", "1")]
    assert [(row["jpg_0"], row["jpg_1"]) for row in table] == [
        (image[win], image[lose]) for win, lose in expected
    ]
    assert {(row["label_0"], row["caption"]) for row in table} == {(1.0, "p")}
    again = utilgen(*line, "--layout", "pickapic", check=False)
    assert (again.returncode, b"is there already" in again.stderr) == (2, True)


def test_a_parquet_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def breaking() -> Iterator[Sample]:
        yield Sample("a", {"jpg_0": b"x", "jpg_1": b"y", "label_0": b"1", "caption": b"p"})
        raise BadInput("b", "breaks off")

    with pytest.raises(BadInput):
        write_pickapic(breaking(), tmp_path / "a.parquet")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("utility", [None, "0.5", True, [1], 10**400])
def test_what_is_no_number_is_bad_input(utility: object) -> None:
    bad = scored("a", 0.5).with_member("utility.json", encode_json({"utility": utility}))
    with pytest.raises(BadInput, match="not a number"):
        pair([bad])


def test_unscored_samples_get_told_what_to_run() -> None:
    sample = scored("a", 0.5)
    del sample.members["utility.json"]
    with pytest.raises(BadInput, match="utilgen value score"):
        pair([sample])


@pytest.mark.parametrize(
    "settings_", [{"strategy": "best"}, {"quantile": 0.6}, {"quantile": 0.0}, {"min_margin": -1.0},
                  {"layout": "x"}, {"max_per_class": 0}, {"quantile": float("nan")}]
)  # fmt: skip
def test_settings_that_make_no_sense(settings_: dict) -> None:
    with pytest.raises(UsageError):
        PairingConfig(**settings_)


def test_memory_stays_below_a_kilobyte_a_sample() -> None:
    """Images of 12 kB each: they lie on disk. (1,000,000 samples: 200 MB in all, measured.)"""
    rng = np.random.default_rng(0)

    def many(count: int) -> Iterator[Sample]:
        for i in range(count):
            noise = rng.integers(0, 100, (64, 64, 3), dtype=np.uint8)
            rgb = picture(i).repeat(4, 0).repeat(4, 1) // 2 + noise
            yield scored(f"k{i:06d}", float(rng.random()), i % 10, rgb)

    peaks = []
    for count in (100, 500):
        tracemalloc.start()
        made = sum(1 for _ in pair_samples(many(count), PairingConfig(strategy="nearest")))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert made >= count // 4 - 10
    assert peaks[1] - peaks[0] < 400 * 1000


def test_of_many_classes_some_are_named() -> None:
    report = PairingReport()
    for label in range(100):
        why = "it has one sample" if label < 50 else ""
        report.classes[label] = ClassPairs(f"class {label}", 4, 0, label // 50 * (label - 47), why)
    first, *rest = report.lines()
    assert "in 50 of 100 classes (3 to 52 a class)" in first
    assert len(rest) == 21 and rest[19] == "no pair in class 19: it has one sample"
    assert rest[20] == "no pair in 30 more classes: see --json"


def test_a_class_that_was_predicted_is_named_by_its_number() -> None:
    """By its name it would count as another class, without a word."""
    named = scored("a", 0.5).with_member("utility.json", b'{"utility": 0.5, "predicted": "cat"}')
    with pytest.raises(BadInput, match="its predicted is 'cat', not the number of a class"):
        pair([named, scored("b", 0.1)])
