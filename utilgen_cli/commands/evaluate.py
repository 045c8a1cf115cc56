"""`utilgen eval`: what synthetic images do for a classifier."""

from __future__ import annotations

from . import evaluate_options as o
from .options import Device, Json, OnError, Overwrite, Precision, Quiet, Smoke, Verbose


def evaluate(
    real: o.Real,
    test: o.Test,
    synthetic: o.Synthetic = None,
    val: o.Validation = None,
    arch: o.Arch = None,
    seeds: o.Seeds = 5,
    seed: o.FirstSeed = 0,
    times: o.Times = None,
    baseline: o.Baseline = "real",
    preset: o.Preset = "quick",
    steps: o.Steps = None,
    batch_size: o.BatchSizeTrained = None,
    lr: o.LearningRate = None,
    size: o.Size = None,
    real_share: o.RealShare = 0.5,
    val_as_train: o.ValAsTrain = False,
    validate_every: o.Validate = 0,
    pretrained: o.Pretrained = False,
    augment: o.Augment = None,
    workers: o.Workers = None,
    data_parallel: o.DataParallel = False,
    output: o.Keep = None,
    report: o.Report = None,
    value: o.ValueModel = None,
    scored: o.Scored = None,
    price_per_hour: o.Price = None,
    device: Device = None,
    precision: Precision = None,
    on_error: OnError = "stop",
    overwrite: Overwrite = False,
    smoke: Smoke = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the classifier on each arm and test it once: real, synthetic, and both joined.

    All arms get equally many steps; nothing is ever selected on the test set. Example:

    utilgen eval --real real/ --synthetic base=synth/ --val val/ --test test/ --report report.html
    """  # fmt: skip
    from ..classification import comparison as c
    from ..classification.batches import workers_for
    from ..classification.models import refuse_pretrained, refuse_unknown
    from ..classification.train import PRESET_ARCHS
    from ..classification.train import preset as preset_config
    from ..report.evaluation import prepare_report, write_report
    from ..runtime.device import pick_device, pick_precision
    from ..runtime.progress import reporter
    from .evaluate_options import open_inputs, read_value, show
    from .quarantining import quarantine_of, tell

    aside = quarantine_of(on_error)
    inputs, shown = open_inputs(real, synthetic, val, test, scored, aside)
    learned = read_value(value)
    archs = arch or [PRESET_ARCHS.get(preset, "small-cnn")]
    refuse_unknown(archs)
    refuse_pretrained(archs, pretrained)
    where = pick_device(device)
    config = preset_config(
        preset, steps=10 if smoke else steps, batch_size=batch_size, lr=lr, real_share=real_share,
        validate_every=min(validate_every, 10) if smoke else validate_every,
        precision=pick_precision(precision, where), augmentation=augment,
    )  # fmt: skip
    pixels = size or (32 if set(archs) == {"small-cnn"} else 224)
    protocol = c.Protocol(
        config, archs, seeds, seed, pixels, times or (), baseline, val_as_train, pretrained,
        price_per_hour, where, workers_for(config.augmentation, where, workers), data_parallel,
    )  # fmt: skip
    if report is not None:
        prepare_report(report)
    found = c.compare_arms(inputs, protocol, output, overwrite, reporter(quiet))
    if found is None:  # under torchrun the first process tells
        return
    tell(aside, "eval")
    found.summary |= aside.summary()
    show(found.summary, as_json)
    if report is not None:
        write_report(report, found, shown, learned)
