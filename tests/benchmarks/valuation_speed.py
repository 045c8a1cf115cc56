"""Time and peak memory of the meta-gradient: one JVP, double backward, and plain steps.

"JVP in one of three" is the default of `value train` (--meta-every 3).
"""

from __future__ import annotations

import torch

from utilgen_cli.classification.models import build_classifier
from utilgen_cli.valuation.bilevel import (
    MetaStep,
    inner_step,
    meta_gradient_exact_double,
    meta_gradient_jvp,
    take_step,
)
from utilgen_cli.valuation.weight_net import WeightNet

from .harness import interleaved, record, table

ETA = 0.05
SIZES = {"small-cnn": (64, 32), "resnet18": (32, 64), "vit_tiny_patch16_224": (4, 224)}


class Bench:
    """One classifier with its optimiser, W, and the batches of a step."""

    def __init__(self, arch: str, device: str) -> None:
        batch, size = SIZES[arch]
        self.device = torch.device(device)
        layout = torch.channels_last
        self.model = build_classifier(arch, 10, size).train()
        self.model.to(self.device, memory_format=layout)
        self.net = WeightNet().to(self.device)
        generator = torch.Generator().manual_seed(0)
        self.batch, self.val = (
            (
                torch.rand(batch, 3, size, size, generator=generator).to(
                    self.device, memory_format=layout
                ),
                torch.randint(10, (batch,), generator=generator).to(self.device),
            )
            for _ in range(2)
        )
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3)
        self.phi = torch.optim.Adam(self.net.parameters(), lr=1e-3)

    def plain(self) -> None:
        """A weighted step without an outer one."""
        take_step(self.model, self.optimizer, inner_step(self.model, self.net, self.batch))

    def outer(self, meta: MetaStep) -> None:
        """The step of phi."""
        for p, g in zip(self.net.parameters(), meta.phi_gradient, strict=True):
            p.grad = g
        self.phi.step()

    def jvp(self) -> None:
        """Outer step by one JVP; the actual step takes the virtual one's gradient."""
        meta = meta_gradient_jvp(self.model, self.net, self.batch, self.val, ETA)
        self.outer(meta)
        take_step(self.model, self.optimizer, meta.inner)

    def double(self) -> None:
        """Double backward as published: the actual step makes its own pass after that of phi."""
        self.outer(meta_gradient_exact_double(self.model, self.net, self.batch, self.val, ETA))
        self.plain()


def main(archs: tuple[str, ...] = tuple(SIZES)) -> None:
    """One table a classifier."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for arch in archs:
        bench = Bench(arch, device)
        sides = {
            "plain": lambda bench=bench: [bench.plain() for _ in range(3)],
            "JVP": lambda bench=bench: [bench.jvp() for _ in range(3)],
            "JVP in one of three": lambda bench=bench: [bench.jvp(), bench.plain(), bench.plain()],
            "double backward": lambda bench=bench: [bench.double() for _ in range(3)],
        }
        batch, size = SIZES[arch]
        body = table(interleaved(sides, warm=2), "double backward")
        record(f"Meta-gradient, three steps: {arch}, batch {batch}, {size} px", body)


if __name__ == "__main__":
    main()
