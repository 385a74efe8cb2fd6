"""Guided sampling of a U-Net beside denoising-diffusion-pytorch, which brings the network for both.

    pip install --no-deps denoising-diffusion-pytorch==2.3.4
    python benchmarks/unet.py --rounds 3 --out benchmarks/results

Random weights: their class-conditional Unet of width 32, (1, 2, 4) times that on three resolutions, images of 3 x 32 x
32, 10 classes and the prediction v; 20 steps of DDIM at scale 3. Their sampler removes from the direction what lies
along the conditional output, rescales with phi = 0.7 and clips x0: `as theirs` is ours with the same three, and
tests/test_bench_unet.py shows that both give one image. `plain` is the formula alone. Theirs runs a forward a branch.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import torch
from timing import Case, Group, command_line, device
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from unicfg import Guidance, sample_diffusion
from unicfg.guidance import mitigations, schedules
from unicfg.guidance.core import Mitigation
from unicfg.guidance.spaces import Space

PEER, VERSION = "denoising-diffusion-pytorch", "2.3.4"
DIM, MULTIPLES, SIDE, CHANNELS, CLASSES, TRAINED_STEPS = 32, (1, 2, 4), 32, 3, 10, 1000
STEPS, SCALE, START, END = 20, 3.0, 0.2, 0.8
PLAIN, OURS, LATE = "unicfg, s = 1", "unicfg, plain", "unicfg, plain, for the middle 60 %"
REINED = "unicfg, as theirs"
THEIRS, THEIR_PLAIN, THEIR_UNGUIDED = (f"{PEER}, {how}" for how in ("guided", "plain", "s = 1"))


def peer() -> Any:
    """Their module of guidance, without their package, whose other modules want a torchvision.

    Raises:
        ImportError: if the distribution is not installed.
    """
    try:
        file = distribution(PEER).locate_file(
            "denoising_diffusion_pytorch/classifier_free_guidance.py"
        )
    except PackageNotFoundError:
        raise ImportError(
            f"{PEER} is not installed: pip install --no-deps {PEER}=={VERSION}"
        ) from None
    spec = importlib.util.spec_from_file_location("classifier_free_guidance", str(file))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tqdm = functools.partial(module.tqdm, disable=True)  # a bar a sampling
    return module


@dataclass(frozen=True, eq=False)
class Steps:
    """The path of a model that was trained on N discrete noise levels: t = (i + 1) / N is step i, t = 0 clean data.

    Attributes:
        squared: alpha squared, float64 (N + 1,); entry 0 is 1.
    """

    squared: Tensor

    @property
    def last(self) -> int:
        """N."""
        return len(self.squared) - 1

    def place(self, t: Tensor) -> Tensor:
        """The entry nearest to ``t``."""
        return (t * self.last).round().long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma at ``t``."""
        squared = self.squared[self.place(t)]
        return squared.sqrt().to(t.dtype), (1 - squared).sqrt().to(t.dtype)

    def time(self, ratio: Tensor) -> Tensor:
        """The first t at which sigma / alpha is ``ratio`` or more, or 1."""
        high = torch.searchsorted(-self.squared, -1 / (1 + ratio.double().square()))
        return high.clamp(max=self.last).double() / self.last

    def times(self, steps: int) -> Tensor:
        """The grid of their sampler, float64 (steps + 1,): whole steps, rounded down, from the last to clean data."""
        whole = torch.linspace(-1, self.last - 1, steps + 1).int()
        return (whole.flip(0) + 1).double() / self.last


def steps_of(diffusion: Any) -> Steps:
    """The noise levels of their ``GaussianDiffusion``."""
    table = diffusion.alphas_cumprod.double().cpu()
    return Steps(torch.cat([torch.ones(1, dtype=torch.float64), table]))


def denoiser(unet: Any, path: Steps) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Their Unet as samplers call it, with the class ``CLASSES`` as null: one pass holds rows of both branches."""

    def network(x: Tensor, classes: Tensor, t: Tensor) -> Tensor:
        keep = classes != CLASSES
        known = torch.where(keep, classes, 0)  # the mask puts their null embedding in its place
        out: Tensor = unet(x, path.place(t) - 1, known, cond_keep_mask=keep)
        return out

    return network


def on_outputs(mitigation: Mitigation) -> Mitigation:
    """A mitigation on what the model predicts, whatever its own space: so they apply theirs."""

    def mitigate(guided: Tensor, cond_out: Tensor, uncond_out: Tensor) -> Tensor:
        return mitigation(guided, cond_out, uncond_out)

    return mitigate


def their_guidance(scale: float) -> Guidance:
    """What their ``sample(cond_scale=scale)`` does: projection, rescaling, clipping."""
    reins = (
        on_outputs(mitigations.apg(eta=0.0)),
        on_outputs(mitigations.rescale(0.7)),
        mitigations.static_threshold(1.0),
    )
    return Guidance(scale, reins)


def sample(
    unet: Any, path: Steps, classes: Tensor, guidance: Guidance, space: Space = "v"
) -> Tensor:
    """Images (B, 3, H, W) of classes (B,), by our sampler on their grid."""
    return sample_diffusion(
        denoiser(unet, path),
        classes,
        uncond=torch.tensor(CLASSES),
        guidance=guidance,
        seeds=range(len(classes)),
        shape=(CHANNELS, SIDE, SIDE),
        path=path,
        space=space,
        times=path.times(STEPS),
    )


def make_unet(module: Any) -> Any:
    """Their network, with random weights."""
    unet = module.Unet(dim=DIM, num_classes=CLASSES, dim_mults=MULTIPLES, channels=CHANNELS)
    return unet.eval().to(device())


def make_diffusion(module: Any, unet: Any, objective: str = "pred_v") -> Any:
    """Their sampler, without fresh noise."""
    return module.GaussianDiffusion(
        unet,
        image_size=SIDE,
        timesteps=TRAINED_STEPS,
        sampling_timesteps=STEPS,
        objective=objective,
        ddim_sampling_eta=0.0,
    ).to(device())


def without_projection(unet: Any) -> Any:
    """The same network; their sampler leaves this setting out of reach."""
    other = copy.copy(unet)
    other.forward_with_cond_scale = functools.partial(
        unet.forward_with_cond_scale, remove_parallel_component=False
    )
    return other


def without_guidance(unet: Any) -> Any:
    """The same network in one pass a step: with cond_scale = 1 theirs returns one output where two are unpacked."""

    def one_pass(
        x: Tensor, time: Tensor, classes: Tensor, cond_scale: float, rescaled_phi: float
    ) -> tuple[Tensor, Tensor]:
        out = unet(x, time, classes, cond_drop_prob=0.0)
        return out, out

    other = copy.copy(unet)
    other.forward_with_cond_scale = one_pass
    return other


def their_plain(diffusion: Any, classes: Tensor, scale: float) -> Tensor:
    """Their sampler without rescaling and clipping: images (B, 3, H, W) in [0, 1], were they clipped."""
    shape = (len(classes), CHANNELS, SIDE, SIDE)
    images: Tensor = diffusion.ddim_sample(
        classes, shape, cond_scale=scale, rescaled_phi=0.0, clip_denoised=False
    )
    return images


def operations_of_a_pass(unet: Any, classes: Tensor) -> int:
    """Multiplications and additions of one forward."""
    x = torch.zeros(len(classes), CHANNELS, SIDE, SIDE, device=device())
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(x, torch.zeros_like(classes), classes, cond_drop_prob=0.0)
    total: int = counter.get_total_flops()
    return total


def group(batch: int) -> Group:
    """All cases of a batch size."""
    module = peer()
    unet = make_unet(module)
    reined, plain, unguided = (
        make_diffusion(module, network)
        for network in (unet, without_projection(unet), without_guidance(unet))
    )
    path = steps_of(reined)
    classes = torch.randint(CLASSES, (batch,), device=device())
    ours = functools.partial(sample, unet, path, classes)
    cases: dict[str, Case] = {
        PLAIN: lambda: ours(Guidance(1.0)),
        OURS: lambda: ours(Guidance(SCALE)),
        LATE: lambda: ours(Guidance(schedules.interval(SCALE, START, END))),
        REINED: lambda: ours(their_guidance(SCALE)),
        THEIR_UNGUIDED: lambda: their_plain(unguided, classes, 1.0),
        THEIR_PLAIN: lambda: their_plain(plain, classes, SCALE),
        THEIRS: lambda: reined.sample(classes, cond_scale=SCALE),
    }
    ratios = (
        ("guided as theirs, against theirs", REINED, THEIRS, "-"),
        ("guided, plain, against theirs", OURS, THEIR_PLAIN, "-"),
        ("unguided, against theirs", PLAIN, THEIR_UNGUIDED, "-"),
        ("guided, plain, against unguided", OURS, PLAIN, "-"),
        ("guided, plain, for the middle 60 %, against unguided", LATE, PLAIN, "-"),
        ("guided for the middle 60 %, against theirs, plain", LATE, THEIR_PLAIN, "-"),
        ("theirs, plain, against theirs unguided", THEIR_PLAIN, THEIR_UNGUIDED, "-"),
    )
    once = float(STEPS * operations_of_a_pass(unet, classes))
    passes = dict.fromkeys(cases, 2.0) | {PLAIN: 1.0, THEIR_UNGUIDED: 1.0, LATE: 1.6}
    operations = {name: once * factor for name, factor in passes.items()}
    return Group(f"Batch {batch}", cases, ("image", batch), ratios, operations=operations)


def main() -> None:
    """Measure, print, and write the table."""
    try:
        peer()
    except ImportError as missing:
        sys.exit(str(missing))  # the network is theirs: without it there is nothing to measure
    command_line("unet", "Guided sampling of a U-Net", group, (1, 8), ("torch", PEER))


if __name__ == "__main__":
    main()
