"""See what guidance does, in both worlds: diffusion on the plane and tokens in words, with everything known exactly.

    python examples/1_two_worlds.py --out out/two_worlds.png

Row 1 and 2: the target p(x) p(y|x)^s, and what guided sampling draws at s = 0, 1, 3 and 7. They are the same at 0 and
1 and differ beyond (Bradley and Nakkiran, arXiv 2408.09000): guidance sharpens each step, not the whole sample.
"Apart" is the total variation distance between the two.

Row 3: two networks learn a tree. Guided against its own unconditional branch the better one drops branches that lie close
to the other class; guided against the worse one it keeps them and still leaves fewer samples off the tree (Karras et
al., arXiv 2406.02507, section 3).
"""

import argparse
import io
import math
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from PIL import Image
from torch import Tensor, nn

from unicfg import Guidance, sample_autoregressive, sample_diffusion
from unicfg.sampling import straight
from unicfg.testing import GaussianMixture, MarkovChain, sequence_index

SCALES = (0.0, 1.0, 3.0, 7.0)
MEANING = {0.0: ": no prompt", 1.0: ": the model as trained"}
TREE_SCALE = 2.0
BEADS = 7  # Gaussians a branch
STRONG, WEAK = 0, 1
TARGET, DRAWN, FAINT, INK = "#3f78b5", "#e4682b", "#b9bdc4", "#2b2f36"
SHADES = LinearSegmentedColormap.from_list("shades", ["#ffffff", "#c9dcf0", "#7fadd8", TARGET])
GREYS = LinearSegmentedColormap.from_list("greys", ["#ffffff", "#dcdee2", "#c3c7cd"])

# row 1: the class that is asked for has a blob among the others and one at the rim
PLANE = GaussianMixture(
    weights=torch.tensor([0.25, 0.25, 0.25, 0.25]),
    means=torch.tensor([[-0.7, 0.3], [1.3, 0.9], [0.5, -0.6], [-0.9, -1.3]]),
    variances=torch.tensor([[0.30, 0.25], [0.20, 0.30], [0.30, 0.20], [0.30, 0.20]]),
    labels=torch.tensor([0, 0, 1, 1]),
)

# row 2: "b" looks like the class at once, "a" only when "c" has followed
LETTERS = "abc"
WORDS = MarkovChain(
    prior=torch.tensor([0.5, 0.5]),
    initial=torch.tensor([[0.35, 0.55, 0.10], [0.35, 0.25, 0.40]]),
    transition=torch.tensor(
        [
            [[0.10, 0.10, 0.80], [0.40, 0.30, 0.30], [0.30, 0.40, 0.30]],
            [[0.60, 0.35, 0.05], [0.40, 0.30, 0.30], [0.30, 0.40, 0.30]],
        ]
    ),
    length=2,
)


def draw_plane(figure: SubFigure, samples: int) -> None:
    """Row 1: shading is the target, a dot a guided sample, a grey line where the other class lives."""
    low, high, cells = -2.8, 3.1, 160
    line = torch.linspace(low, high, cells, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    other = PLANE.log_prob(points, 1).exp().view(cells, cells)
    for axes, s in zip(figure.subplots(1, len(SCALES)), SCALES, strict=True):
        target = PLANE.sharpened(points, 0, s).view(cells, cells)
        axes.imshow(target.T.numpy(), cmap=SHADES, origin="lower", extent=(low, high, low, high))
        axes.contour(
            line.numpy(), line.numpy(), other.T.numpy(), levels=3, colors=FAINT, linewidths=0.8
        )
        x = sample_diffusion(
            PLANE,
            torch.zeros(samples, 1, dtype=torch.long),
            uncond=PLANE.null_condition,
            guidance=Guidance(s),
            seeds=range(samples),
            solver="heun",
            steps=40,
        )
        _dots(axes, x, 3)
        axes.set(xlim=(low, high), ylim=(low, high))
        axes.set_title(f"s = {s:g}{MEANING.get(s, '')}")


def draw_words(figure: SubFigure, samples: int) -> None:
    """Row 2: a pair of bars a word, and the distance between the two distributions."""
    words = [a + b for a in LETTERS for b in LETTERS]
    places = torch.arange(len(words)).numpy()
    for axes, s in zip(figure.subplots(1, len(SCALES), sharey=True), SCALES, strict=True):
        ids = sample_autoregressive(
            WORDS,
            torch.zeros(samples, 1, dtype=torch.long),
            uncond=WORDS.null_condition,
            guidance=Guidance(s),
            seeds=range(samples),
        )
        drawn = torch.bincount(sequence_index(ids, len(LETTERS)), minlength=len(words)) / samples
        target, exact = WORDS.sharpened(0, s), WORDS.guided(0, Guidance(s))
        axes.bar(places - 0.2, target.numpy(), 0.4, color=TARGET)
        axes.bar(places + 0.2, drawn.numpy(), 0.4, color=DRAWN)
        axes.plot(places + 0.2, exact.numpy(), "_", color=INK, markersize=7, markeredgewidth=1.2)
        apart = float((target - exact).abs().sum() / 2)
        axes.text(0.98, 0.94, f"{apart:.0%} apart", transform=axes.transAxes, ha="right", va="top")
        axes.set_xticks(places, words)
        axes.tick_params(length=0)
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color="#eceef0")
        axes.set_axisbelow(True)


def tree(levels: int = 4) -> GaussianMixture:
    """Two classes of branches strung from small Gaussians.

    Each branch ends in two that are shorter, thinner and turned away; the inner ones of both classes meet.
    """
    means, deviations, labels = [], [], []

    def grow(start: Tensor, angle: float, level: int, label: int) -> None:
        length = 0.95 * 0.76**level
        towards = torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64)
        for bead in range(BEADS):
            means.append(start + length * (bead + 0.5) / BEADS * towards)
            deviations.append(0.075 * 0.8**level)
            labels.append(label)
        end = start + length * towards
        for turn in (-1, 1) if level + 1 < levels else ():
            grow(end, angle + turn * math.radians(36 - 4 * level), level + 1, label)

    root = torch.tensor([0.0, -1.3], dtype=torch.float64)
    grow(root, math.radians(122), 0, 0)
    grow(root, math.radians(58), 0, 1)
    thickness = torch.tensor(deviations, dtype=torch.float64)
    # a thin branch holds less than a thick one
    weights = thickness / thickness.sum()
    return GaussianMixture(weights, torch.stack(means), thickness.square(), torch.tensor(labels))


class Denoiser(nn.Module):
    """A small network: noisy points x (R, 2), labels (R, 1), times (R,) -> velocities (R, 2)."""

    def __init__(self, width: int, layers: int, octaves: int) -> None:
        super().__init__()
        self.octaves = octaves
        self.label = nn.Embedding(3, width)
        self.enter = nn.Linear(2 + 4 * octaves + 2, width)
        self.hidden = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.leave = nn.Linear(width, 2)

    def forward(self, x: Tensor, label: Tensor, t: Tensor) -> Tensor:
        """Velocity eps - x0 of the straight path."""
        waves = [f(x * 2.0**k) for k in range(self.octaves) for f in (torch.sin, torch.cos)]
        level = torch.stack([t, (t + 0.01).log()], 1)
        h = self.enter(torch.cat([x, *waves, level], 1)) + self.label(label[:, 0])
        for layer in self.hidden:
            h = h + layer(nn.functional.silu(h))
        return self.leave(nn.functional.silu(h))


def train(
    toy: GaussianMixture, width: int, layers: int, octaves: int, steps: int, seed: int
) -> Denoiser:
    """Flow matching on the tree, with one label in eight dropped; steadier towards the end, as the rate falls."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Denoiser(width, layers, octaves)
    source = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    label = torch.randint(2, (40_000,), generator=source)
    data = toy.sample(len(label), source, label).float()
    for _ in range(steps):
        chosen = torch.randint(len(data), (512,), generator=source)
        x0, own = data[chosen], label[chosen, None]
        own = torch.where(torch.rand(512, 1, generator=source) < 1 / 8, 2, own)
        # branches are thin: they show at little noise
        t = torch.rand(512, generator=source).square()
        eps = torch.randn(512, 2, generator=source)
        x = (1 - t[:, None]) * x0 + t[:, None] * eps
        loss = (network(x, own, t) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def one_of(networks: list[Denoiser], x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
    """Two networks as one model: the second entry of a condition (R, 2) says which answers the row."""
    out = torch.empty_like(x)
    for number, network in enumerate(networks):
        own = cond[:, 1] == number
        if bool(own.any()):
            out[own] = network(x[own], cond[own, :1], t[own])
    return out


def draw_tree(figure: SubFigure, samples: int, steps: int) -> None:
    """Row 3: the data, and what the strong network draws alone, against no condition, and against the weak one."""
    toy = tree()
    networks = [
        train(toy, 96, 3, 3, steps, seed=0),
        train(toy, 32, 2, 2, steps * 2 // 5, seed=1),
    ]
    cond = torch.tensor([[0, STRONG]]).expand(samples, 2)
    unconditional, weak = torch.tensor([2, STRONG]), torch.tensor([0, WEAK])

    def sample(s: float, uncond: Tensor) -> Tensor:
        return sample_diffusion(
            lambda x, cond, t: one_of(networks, x, cond, t),
            cond,
            uncond=uncond,
            guidance=Guidance(s),
            seeds=range(samples),
            shape=(2,),
            path=straight(),
            space="flow",
            solver="heun",
            steps=32,
        )

    data = toy.sample(samples, torch.Generator().manual_seed(2), 0)
    panels = {
        "the data": data,
        "s = 1: the model as trained": sample(1.0, unconditional),
        f"s = {TREE_SCALE:g} against no prompt": sample(TREE_SCALE, unconditional),
        f"s = {TREE_SCALE:g} against a weak model": sample(TREE_SCALE, weak),
    }
    least = toy.log_prob(toy.sample(4000, torch.Generator().manual_seed(3), 0), 0).quantile(0.01)
    line = torch.linspace(-2.7, 2.7, 120, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    extent = (-2.7, 2.7, -2.7, 2.7)
    shades = {y: toy.log_prob(points, y).exp().pow(0.4).view(120, 120).T for y in (0, 1)}
    for axes, (title, x) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axes.imshow(
            shades[1].numpy(), cmap=GREYS, origin="lower", extent=extent, interpolation="bilinear"
        )
        own = (shades[0] / shades[0].max()).numpy()
        axes.imshow(
            own,
            cmap=SHADES,
            origin="lower",
            extent=extent,
            interpolation="bilinear",
            alpha=own**0.5,
        )
        _dots(axes, x, 2.5)
        axes.set(xlim=(-2.45, 0.85), ylim=(-1.75, 1.55))
        axes.set_title(title)
        off = float((toy.log_prob(x, 0) < least).double().mean())
        kept, branches = branches_kept(toy, x, data)
        axes.text(
            0.03,
            0.03,
            f"{kept} of {branches} branches kept\n{off:.0%} off the tree",
            transform=axes.transAxes,
            va="bottom",
            color=INK,
        )
        print(f"{title}: {kept} of {branches} branches kept, {off:.1%} off the tree")


def branches_kept(toy: GaussianMixture, x: Tensor, data: Tensor) -> tuple[int, int]:
    """How many branches of class 0 hold at least half the share of x that they hold of the data; and how many there are.

    A point belongs to the branch with the nearest bead.
    """
    own = toy.means[toy.labels == 0]
    count = len(own) // BEADS
    shares = [
        torch.bincount(torch.cdist(points.double(), own).argmin(1) // BEADS, minlength=count)
        / max(len(points), 1)
        for points in (x, data)
    ]
    return int((2 * shares[0] >= shares[1]).sum()), count


def _dots(axes: Axes, x: Tensor, size: float) -> None:
    axes.scatter(*x.T.numpy(), s=size, color=DRAWN, alpha=0.75, linewidths=0)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#d5d8dc")


def _heading(figure: SubFigure, title: str, text: str) -> None:
    figure.suptitle(f"$\\bf{{{title}}}$   {text}", x=0.008, ha="left", fontsize=11, color=INK)


def draw(samples: int = 1200, steps: int = 2500) -> Image.Image:
    """The whole picture.

    Args:
        samples: dots a panel.
        steps: of training the strong network of the third row.
    """
    figure = Figure(figsize=(12, 10.2), layout="constrained", facecolor="white")
    key, plane, words, twigs = figure.subfigures(4, 1, height_ratios=[0.09, 1, 0.66, 1])
    key.text(0.008, 0.5, "■", color=TARGET, fontsize=15, va="center")
    key.text(0.026, 0.5, "the target  p(x) p(y|x)$^s$", color=INK, fontsize=12, va="center")
    key.text(0.21, 0.5, "●", color=DRAWN, fontsize=15, va="center")
    key.text(0.23, 0.5, "what guided sampling draws", color=INK, fontsize=12, va="center")
    key.text(
        0.992,
        0.5,
        "out = uncond + s · (cond - uncond)",
        color=INK,
        fontsize=12,
        va="center",
        ha="right",
        family="monospace",
    )
    _heading(
        plane,
        "Diffusion",
        "exact denoiser; grey lines: the other class, from which samples are pushed away, past the target",
    )
    draw_plane(plane, samples)
    _heading(
        words,
        "Tokens",
        "exact logits, words of two letters: “b” looks right at once, “a” only once “c” follows; dashes: by formula",
    )
    draw_words(words, 4 * samples)
    _heading(
        twigs,
        "The\\ second\\ branch",
        "trained networks; blue: the class, grey: the other one. Away from no prompt, or from a weaker network with the prompt",
    )
    draw_tree(twigs, samples, steps)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return Image.open(buffer).convert("RGB").quantize(256)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1200, help="dots a panel")
    parser.add_argument("--steps", type=int, default=2500, help="of training the larger network")
    parser.add_argument("--out", type=Path, default=Path("out/two_worlds.png"))
    options = parser.parse_args()
    picture = draw(options.samples, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.out, optimize=True)
    print(options.out)


if __name__ == "__main__":
    main()
