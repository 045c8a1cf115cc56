"""`utilgen ilpo` from the outside: shards, pairing with generate, replay, resume, refusals."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
import tarfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import Run, flip_last_byte, make_sample, tar_bytes
from tests.policy_parts import make_clip, make_value
from tests.random_bundle import make_bundle
from utilgen_cli.commands import joining
from utilgen_cli.commands.ilpo import ilpo
from utilgen_cli.diffusion.datadream import read_shots
from utilgen_cli.diffusion.inversion import mean_error
from utilgen_cli.diffusion.load import load_model
from utilgen_cli.diffusion.policy import Policy, load_policy
from utilgen_cli.diffusion.prompt_inversion import PromptObjective
from utilgen_cli.diffusion.prompts import PromptEmbeds
from utilgen_cli.runtime.errors import BadInput, NoInput, Stopped, UsageError, UtilgenError
from utilgen_cli.shards.operands import open_source

COMMON = ["--iterations", "1", "--population", "2", "--search-steps", "2", "-q"]


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    """A directory with a random bundle, open_clip model, value model and real shots."""
    make_bundle(tmp_path / "bundle")
    make_clip(tmp_path / "clip")
    make_value(tmp_path / "value")
    shots = [make_sample(10 * i + c, c, 16) for c in range(3) for i in range(2)]
    named = [s.with_member("json", json.dumps({"class_name": n}).encode())
             for s, n in zip(shots, [n for n in ("dress", "bag", "ankle boot") for _ in range(2)], strict=True)]  # fmt: skip
    (tmp_path / "real.tar").write_bytes(tar_bytes(named))
    return tmp_path


def read(path: Path) -> dict[str, bytes]:
    """Members by name."""
    with tarfile.open(path) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar.getmembers()}  # type: ignore[union-attr]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=int)


def test_ilpo_draws_learns_replays_and_resumes(bench: Path, utilgen: Run) -> None:
    """One story: learn and draw; replay with `generate --policy`; a rerun does nothing again."""
    options = ["-m", "bundle", "--clip", "clip", "--per-class", 3, "--shard-size", 6, *COMMON]
    done = utilgen("ilpo", *options, "--real", "real.tar", "--set-term", "gradient-match",
                   "-o", "best", "--save-policy", "policy", "--json")  # fmt: skip
    assert done.stdout == b""
    summary = json.loads(done.stderr.decode().splitlines()[-1])
    assert summary["samples"] == 9
    assert min(summary["learning_seconds"], summary["seconds"]) > 0
    assert {"fidelity_clip", "fidelity_classifier", "gradient_match"} <= set(summary["after"])
    assert (
        summary["sampling_unet_latents"] <= 4 * 2 * 16 * 4
    )  # 4 times plain: tiles of 8, CFG, 4 steps

    best = {**read(bench / "best/00000.tar"), **read(bench / "best/00001.tar")}
    assert [n for n in best if n.startswith("0000-000000")] == [
        f"0000-000000.{m}" for m in ("png", "cls", "json")
    ]
    facts = json.loads(best["0002-000001.json"])
    assert (facts["source"], facts["member"], facts["class_name"]) == ("ilpo", 1, "ankle boot")

    utilgen("generate", "-m", "bundle", "--policy", "policy", "--per-class", 3, "-q", "-o", "again")
    again = read(bench / "again/00000.tar")
    images = [name for name in best if name.endswith("png")]
    assert sorted(images) == sorted(n for n in again if n.endswith("png"))
    assert all(best[name] == again[name] for name in images)

    shard, policy = bench / "best/00001.tar", bench / "policy/policy.json"
    written, learnt = shard.stat().st_mtime_ns, policy.stat().st_mtime_ns
    (bench / "best/00000.tar").unlink()
    rerun = ["ilpo", *options, "--real", "real.tar", "--set-term", "gradient-match", "-o", "best",
             "--save-policy", "policy"]  # fmt: skip
    utilgen(*rerun)
    assert (shard.stat().st_mtime_ns, policy.stat().st_mtime_ns) == (written, learnt)
    assert read(bench / "best/00000.tar").items() <= best.items()
    other = utilgen(*rerun, "--clip-weight", "2", check=False)
    assert other.returncode == 2
    assert b"other settings" in other.stderr
    flip_last_byte(bench / "clip" / "open_clip_model.safetensors")
    other = utilgen(*rerun, check=False)
    assert other.returncode == 2 and b"clip files contents was" in other.stderr


def test_what_cannot_be_compiled_is_said_before_anything_is_learnt(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a policy is the same whether or not drawing is compiled."""
    monkeypatch.chdir(bench)
    options: dict[str, Any] = {"model": "bundle", "clip": "clip", "quiet": True, "smoke": True,
                               "save_policy": Path("policy")}  # fmt: skip

    def no_backend(*_: object) -> None:
        raise RuntimeError("no compiler here")

    plainly = torch.compile
    monkeypatch.setattr(torch, "compile", partial(plainly, backend=no_backend))
    with pytest.raises(UtilgenError, match="--compile: the U-Net cannot be compiled"):
        ilpo(**options, output="best", compile=True)
    assert not (bench / "policy").exists()
    ilpo(**options, output="best")
    learnt = (bench / "policy/policy.json").stat().st_mtime_ns
    monkeypatch.setattr(torch, "compile", partial(plainly, backend="eager"))
    ilpo(**options, output="compiled", compile=True)
    assert (bench / "policy/policy.json").stat().st_mtime_ns == learnt
    plain, compiled = read(bench / "best/00000.tar"), read(bench / "compiled/00000.tar")
    for name in (n for n in plain if n.endswith("png")):
        assert np.abs(pixels(plain[name]) - pixels(compiled[name])).max() <= 1


def test_without_optimisation_it_is_generate(bench: Path, utilgen: Run) -> None:
    """No iterations, one prompt, noise untouched: the same noise and pictures as `generate`."""
    utilgen("generate", "-m", "bundle", "--per-class", 1, "--seed", 5, "-q", "-o", "plain")
    utilgen("ilpo", "-m", "bundle", "--clip", "clip", "--per-class", 1, "--seed", 5, "-q", "--iterations",
            0, "--population", 1, "--noise", "none", "-o", "same")  # fmt: skip
    plain, same = read(bench / "plain/00000.tar"), read(bench / "same/00000.tar")
    assert list(plain) == list(same)
    for name in plain:
        if name.endswith("png"):
            assert np.abs(pixels(plain[name]) - pixels(same[name])).max() <= 1


def test_without_iterations_all_images_come_of_the_class_prompt(bench: Path, utilgen: Run) -> None:
    """The members of a population would differ by the jitter they begin with."""
    utilgen("generate", "-m", "bundle", "--per-class", 3, "-q", "-o", "plain")
    utilgen("ilpo", "-m", "bundle", "--clip", "clip", "--per-class", 3, "-q", "--iterations", 0,
            "--noise", "none", "-o", "same")  # fmt: skip
    plain, same = read(bench / "plain/00000.tar"), read(bench / "same/00000.tar")
    for name in (name for name in plain if name.endswith("png")):
        assert np.abs(pixels(plain[name]) - pixels(same[name])).max() <= 1


def test_a_bundle_that_names_no_classes_takes_those_that_were_learnt(
    bench: Path, utilgen: Run
) -> None:
    """As Stable Diffusion's: `ilpo` asks the value model, `generate` the policy."""
    facts = json.loads((bench / "bundle/utilgen.json").read_text())
    del facts["classes"]
    (bench / "bundle/utilgen.json").write_text(json.dumps(facts))
    options = ["-m", "bundle", "--per-class", 1, "-q", "-o"]
    utilgen("ilpo", *COMMON, "--clip", "clip", *options, "best", "--save-policy", "policy")
    utilgen("generate", "--policy", "policy", *options, "again")
    best, again = read(bench / "best/00000.tar"), read(bench / "again/00000.tar")
    for name in (name for name in best if name.endswith("png")):
        assert np.abs(pixels(best[name]) - pixels(again[name])).max() <= 1
    assert json.loads(again["0001-000000.json"])["class_name"] == "bag"
    done = utilgen("generate", *options, "none", check=False)
    assert done.returncode == 2 and b"names no classes" in done.stderr
    done = utilgen("generate", "--policy", "policy", "--prompt", "a {}", *options, "x", check=False)
    assert done.returncode == 2 and b"--prompt: a policy has prompts of its own" in done.stderr


def test_a_policy_without_names_is_gone_on_from_and_gives_none(bench: Path, utilgen: Run) -> None:
    model = load_model(str(bench / "bundle"))
    with torch.no_grad():
        embeds = model.encode_prompts(["a", "b", "c"])[:, None]
    Policy(embeds, ["0", "1", "2"], ["a", "b", "c"], unnamed=frozenset({0, 1, 2})).save(
        bench / "prompts"
    )
    begun = ["--init", "prompts", "--iterations", 0, "--clip", "clip", "--smoke", "-q"]
    kept = ["-m", "bundle", *begun, "-o", "best", "--save-policy", "kept"]
    utilgen("ilpo", *kept)
    drawn = [s.facts for s in open_source([str(bench / "best")]).samples()]
    assert len(drawn) == 3 and not any("class_name" in facts for facts in drawn)
    weights = bench / "kept" / "policy.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    utilgen("ilpo", *kept)
    assert weights.read_bytes() == whole


def test_a_value_model_without_names_fits_any_and_gives_none(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench)
    facts = json.loads(Path("value/value.json").read_text())
    facts |= {"classes": ["0", "1", "2"], "unnamed": [0, 1, 2]}
    Path("value/value.json").write_text(json.dumps(facts))
    options: dict[str, Any] = {"model": "bundle", "clip": "clip", "quiet": True, "smoke": True}
    ilpo(**options, output="best")
    assert (bench / "best/00000.tar").exists()
    bundle = json.loads(Path("bundle/utilgen.json").read_text())
    del bundle["classes"]
    Path("bundle/utilgen.json").write_text(json.dumps(bundle))
    with pytest.raises(UsageError, match="names no classes"):
        ilpo(**options, output="none")


def test_an_objective_of_ones_own_lies_where_the_command_is_called(
    bench: Path, commands: Path
) -> None:
    """The installed script has no working directory among Python's paths."""
    (bench / "brighter.py").write_text("def score(images, labels): return images.mean((1, 2, 3))")
    words = [str(w) for w in ("ilpo", "-m", "bundle", "--clip", "clip", *COMMON, "--objective",
                              "brighter:score", "-o", "best")]  # fmt: skip
    subprocess.run([commands / "utilgen", *words], cwd=bench, check=True)
    drawn = json.loads(read(bench / "best/00000.tar")["0000-000000.json"])
    assert drawn["objective"] == "brighter:score"


def test_a_stream_is_one_tar_and_smoke_is_quick(bench: Path, utilgen: Run) -> None:
    done = utilgen("ilpo", "-m", "bundle", "--clip", "clip", "--smoke", "--parameters", "tokens",
                   "--noise", "full", "--objective", "entropy", "--grad-steps", "last:1")  # fmt: skip
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        assert len(tar.getnames()) == 9
    assert b"label fidelity on held-out noise" in done.stderr
    assert b"U-Net latents" in done.stderr


@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        ({"grad_steps": "first"}, UsageError, "last:K"),
        ({"set_term": "coverage"}, UsageError, "--real"),
        ({"set_term": "luck"}, UsageError, "gradient-match"),
        ({"noise": "loud"}, UsageError, "zigzag"),
        ({"parameters": "words"}, UsageError, "tokens"),
        ({"init": Path("prompts"), "tokens": Path("tokens")}, UsageError, "Leave one of them out"),
        ({"init": Path("prompts"), "population": 2}, UsageError, "Leave one of them out"),
        ({"anchor_weight": 1.0}, UsageError, "--real"),
        (
            {"diversity": 1.0, "population": 1},
            UsageError,
            "--diversity: needs two images of a class",
        ),
        ({"search_steps": 2000}, UsageError, "--search-steps 2000: must lie between 1 and"),
        ({"steps": 2000}, UsageError, "^--steps 2000"),
        ({"objective": "beauty"}, UsageError, "MODULE:FUNCTION"),
        ({"value": Path("nowhere")}, NoInput, "value train"),
        ({"value": Path("other")}, BadInput, "other classes"),
        ({"clip": "no-such-clip"}, NoInput, "open_clip"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_shard(
    bench: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], kind: type, says: str
) -> None:
    monkeypatch.chdir(bench)
    make_value(bench / "other", classes=["a", "b"])
    with pytest.raises(kind, match=says) as caught:
        ilpo(**{"model": "bundle", "clip": "clip", "output": "best", "quiet": True, **options})
    assert "\n" not in str(caught.value)
    assert not list(bench.glob("best/*.tar"))


@pytest.mark.parametrize("missing", ["dress", "ankle boot"])
@pytest.mark.parametrize("option", [{"set_term": "coverage"}, {"set_term": "gradient-match"}, {"clip_image_weight": 1.0}])  # fmt: skip
def test_real_shots_without_a_class_are_refused_where_classes_are_compared(
    option: dict[str, Any], missing: str, bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench)
    kept = [s for s in open_source(["real.tar"]).samples() if s.facts["class_name"] != missing]
    Path("real.tar").write_bytes(tar_bytes(kept))
    with pytest.raises(BadInput, match=f"has no images of {missing}"):
        ilpo(
            model="bundle", clip="clip", quiet=True, real=Path("real.tar"), output="best", **option
        )


def test_a_policy_that_was_not_kept_is_learnt_for_save_policy(bench: Path, utilgen: Run) -> None:
    options = ["ilpo", "-m", "bundle", "--clip", "clip", *COMMON, "-o", "best"]
    utilgen(*options)
    written = (bench / "best/00000.tar").stat().st_mtime_ns
    utilgen(*options, "--save-policy", "policy")
    assert (bench / "best/00000.tar").stat().st_mtime_ns == written
    kept, saved = (load_policy(bench / name) for name in ("best/.policy", "policy"))
    assert torch.equal(kept.prompt_embeds, saved.prompt_embeds)


def test_overwritten_and_stopped_in_the_drawing_it_keeps_the_policy(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench)
    again = partial(ilpo, model="bundle", clip="clip", output="best", iterations=1, search_steps=2,
                    population=2, overwrite=True, quiet=True)  # fmt: skip

    def stop(*_: object) -> None:
        raise Stopped("TERM", "stopped")

    written = []
    for attempt in range(3):
        with monkeypatch.context() as patch:
            if attempt == 0:
                patch.setattr(joining.PolicyGenerator, "adopt", stop)
            with pytest.raises(Stopped) if attempt == 0 else nullcontext():
                again()
        written.append(Path("best/.policy/policy.json").stat().st_mtime_ns)
    assert written[0] == written[1] != written[2]


def test_no_tar_reaches_a_terminal_before_any_work(bench: Path) -> None:
    """With stdout a terminal it refuses at once: the hub is not asked for the model it names."""
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "utilgen_cli", "ilpo", "-m", "nobody/nothing"]
    done = subprocess.run(
        command, stdout=terminal, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, cwd=bench
    )
    os.close(terminal)
    os.close(main)
    assert done.returncode == 2
    assert b"terminal" in done.stderr


def test_it_begins_with_the_prompts_of_a_policy(utilgen: Run, bench: Path) -> None:
    """Without iterations the prompts that `invert` learnt come out as they went in."""
    model = ["-m", "bundle", "--smoke", "-q", "-o"]
    utilgen("invert", "real.tar", "--population", 2, *model, "prompts")
    options = ["ilpo", "--value", "value", "--clip", "clip", "--init", "prompts", *model]
    utilgen(*options, "drawn", "--iterations", 0, "--save-policy", "kept")
    begun, kept = (load_policy(bench / name) for name in ("prompts", "kept"))
    assert torch.equal(begun.prompt_embeds, kept.prompt_embeds)
    utilgen(*options, "moved", "--iterations", 1, "--save-policy", "climbed")
    assert not torch.equal(load_policy(bench / "climbed").prompt_embeds, begun.prompt_embeds)
    done = utilgen(*options, "tokens", "--parameters", "tokens", check=False)
    assert done.returncode == 2
    assert b"--parameters tokens: a policy has encoded prompts" in done.stderr


def test_other_adapters_than_prompts_and_tokens_were_learnt_with_are_told(
    utilgen: Run, bench: Path
) -> None:
    model = ["-m", "bundle", "--smoke", "-o"]
    utilgen("lora", "real.tar", *model, "lora")
    learnt = ["invert", "real.tar", "--adapter", "lora", *model]
    utilgen(*learnt, "prompts", "--population", 2)
    utilgen(*learnt, "tokens")
    for kind, name in (("policy", "prompts"), ("tokens", "tokens")):
        drawn = ["generate", f"--{kind}", name, *model]
        line = f"warning: {kind} {name} was learnt with adapter lora, and is drawn with no adapter"
        assert line in utilgen(*drawn, f"{name}-without").stderr.decode()
        assert b"warning" not in utilgen(*drawn, f"{name}-with", "--adapter", "lora").stderr
    begun = ["ilpo", "--clip", "clip", "--init", "prompts", "--iterations", 0, *model]
    assert b"policy prompts was learnt with adapter lora" in utilgen(*begun, "a").stderr
    utilgen(*begun, "b", "--adapter", "lora", "--save-policy", "kept")
    kept = ["generate", "--policy", "kept", *model]
    assert b"warning" not in utilgen(*kept, "c", "--adapter", "lora").stderr
    assert b"policy kept was learnt with adapter lora" in utilgen(*kept, "d").stderr
    utilgen("lora", "real.tar", *model, "lora", "--seed", 1, "--overwrite")
    changed = utilgen(*kept, "e", "--adapter", "lora").stderr
    assert b"adapter lora changed since policy kept was learnt with it" in changed
    utilgen(
        "invert", "real.tar", *model, "plain"
    )  # what came after the tokens may be drawn with them
    drawn = utilgen("generate", "--tokens", "plain", "--adapter", "lora", *model, "f")
    assert b"warning" not in drawn.stderr


def test_the_loss_of_many_shots_is_that_of_some(
    bench: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly over the set, in whatever order it came."""
    model = load_model(str(bench / "bundle"))
    shots = read_shots(open_source([str(bench / "real.tar")]).samples(), model, lambda s: "")
    objective = PromptObjective(model, shots, PromptEmbeds(model, ["a", "b", "c"], 1, 0))
    seen: list[int] = []
    errors = objective.errors
    monkeypatch.setattr(
        objective, "errors", lambda rows, draw: (seen.extend(rows.tolist()), errors(rows, draw))[1]
    )
    monkeypatch.setattr("utilgen_cli.diffusion.inversion.PROBE_DRAWS", 2)
    mean_error(objective)
    assert sorted(seen) == sorted([*range(6)] * 2)
    seen.clear()
    monkeypatch.setattr("utilgen_cli.diffusion.inversion.PROBE_ROWS", 3)
    mean_error(objective)
    assert sorted(seen) == [0, 0, 2, 2, 5, 5]


def test_an_anchor_holds_the_prompts_to_the_real_shots(utilgen: Run, bench: Path) -> None:
    """Of two climbs the anchored one denoises the shots better; both go the same way every time."""
    common = ["ilpo", "-m", "bundle", "--value", "value", "--clip", "clip", "--iterations", 6,
              "--rate", 0.1, "--population", 2, "--search-steps", 2, "--per-class", 1, "--steps", 2,
              "--noise", "none", "--max-fidelity-drop", 1, "-q"]  # fmt: skip
    model = load_model(str(bench / "bundle"))
    shots = read_shots(open_source([str(bench / "real.tar")]).samples(), model, lambda s: "")
    errors = {}
    for name, weight in (("free", 0), ("anchored", 50), ("again", 50)):
        anchor = ["--anchor-weight", weight, "--real", "real.tar"]
        utilgen(*common, *anchor, "-o", name, "--save-policy", f"{name}-policy")
        learnt = PromptEmbeds.at(load_policy(bench / f"{name}-policy").prompt_embeds)
        errors[name] = mean_error(PromptObjective(model, shots, learnt))
    assert errors["anchored"] < errors["free"]
    assert errors["again"] == errors["anchored"]
    for option, said in (
        ("--anchor-weight", b"needs the real shots. Name them with --real."),
        ("--set-weight", b"there is no set term. Add --set-term."),
    ):
        done = utilgen(*common, option, 2, "-o", "none", check=False)
        assert done.returncode == 2 and b"%s: %s" % (option.encode(), said) in done.stderr
