"""`utilgen ilpo`: draw images from prompts and noise that were optimised for utility."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from . import ilpo_options as i
from . import options as o


def ilpo(
    model: o.Model = None,
    value: o.Value = Path("value"),
    tokens: o.Tokens = None,
    adapter: o.Adapters = None,
    objective: i.Objective = "utility",
    real: i.Real = None,
    set_term: i.SetTerm = "none",
    set_weight: i.SetWeight = 1.0,
    diversity: i.Diversity = 0.0,
    clip: i.Clip = None,
    clip_weight: i.ClipWeight = 0.5,
    clip_image_weight: i.ClipImageWeight = 0.0,
    anchor_weight: i.AnchorWeight = 0.0,
    parameters: i.Parameters = "embeds",
    population: i.Population = None,
    init: i.Init = None,
    iterations: i.Iterations = 40,
    images: i.Images = 1,
    rate: i.Rate = 0.02,
    grad_steps: i.GradStepsOption = "all",
    search_steps: i.SearchSteps = 5,
    chunk: i.Chunk = None,
    max_fidelity_drop: i.MaxFidelityDrop = 0.25,
    noise: i.Noise = "single",
    omega_l: i.OmegaL = 5.5,
    omega_w: i.OmegaW = 1.0,
    refine: i.Refine = 0,
    save_policy: i.SavePolicy = None,
    per_class: o.PerClass = 1,
    start: o.Start = 0,
    steps: o.SamplingSteps = None,
    guidance_scale: o.GuidanceScale = None,
    batch_size: o.BatchSizeDrawn = None,
    compile: o.Compile = False,
    classes: o.Classes = None,
    output: o.StreamOutput = "-",
    shard_size: o.ShardSize = 1000,
    part: o.Part = None,
    seed: o.Seed = 0,
    device: o.Device = None,
    precision: o.Precision = None,
    smoke: o.Smoke = False,
    on_error: o.OnError = "stop",
    overwrite: o.Overwrite = False,
    as_json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Optimise class prompts (through the sampler) and noise for utility, then draw with them.

    Example: utilgen ilpo -m tiny --value value/ --per-class 80 -o best/

    It draws with DDIM: the noise optimisation inverts its steps.
    """  # fmt: skip
    from .streams import plan_items, refuse_terminal, report, run_source

    refuse_terminal(output)
    from ..diffusion.generate import GenerateConfig, known_classes, model_named, warnings_of
    from ..diffusion.instance import InstanceConfig
    from ..diffusion.noise import NoiseConfig
    from ..diffusion.prompt_search import SearchConfig
    from ..runtime.errors import UsageError
    from ..runtime.progress import reporter
    from .joining import Aim, PolicyRun, classes_to_draw
    from .quarantining import quarantine_of, tell

    if smoke:
        per_class, steps, iterations = min(per_class, 2), 4, min(iterations, 2)
        search_steps = min(search_steps, 2)
    for option, given in (("--tokens", tokens), ("--population", population)):
        if init is not None and given is not None:
            raise UsageError(option, "--init has prompts of its own", "Leave one of them out.")
    members = (2 if diversity else 1) if smoke else population or 4
    name = model_named(model, tokens)
    config = GenerateConfig(
        name, seed, tokens, tuple(adapter or ()), None,
        classes_to_draw(classes, name, tokens, value, init), None, steps, guidance_scale,
        batch_size=batch_size, compile=compile,
    )  # fmt: skip
    search = SearchConfig(
        iterations, images, rate, max_fidelity_drop=max_fidelity_drop, chunk=chunk, seed=seed
    )
    instance = InstanceConfig(
        parameters, members, grad_steps, search_steps, anchor_weight, init,
        search,
        NoiseConfig(noise, omega_l, omega_w, refine),
    )  # fmt: skip
    aim = Aim(
        value, objective, clip, clip_weight, clip_image_weight, real, diversity, set_term,
        set_weight,
    )  # fmt: skip
    directory = save_policy or (None if output == "-" else Path(output) / ".policy")
    aside = quarantine_of(on_error)
    plan = plan_items(len(known_classes(config)), per_class, start)
    config = replace(config, images=len(plan))
    run = PolicyRun(
        config, aim, instance, directory, device, precision, reporter(quiet), overwrite, aside
    )
    for line in [] if quiet else warnings_of(config, run.dtype, init):
        report({}, False, f"ilpo: {line}")
    settings = {
        **run.settings(),
        "precision": precision,
        "per_class": per_class,
        "start": start,
        "shard_size": shard_size,
    }
    run_source(run.draw, plan, output, "ilpo", settings, overwrite, shard_size, part, run.about)
    if save_policy is not None:
        run.keep_policy()
    run.end()
    tell(aside, "ilpo")
    report({**run.summary(), **aside.summary()}, as_json, "" if quiet else run.line())
