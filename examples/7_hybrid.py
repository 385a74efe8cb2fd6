"""Guide a model that is not ours: text tokens by logits and image latents by flow, in one transformer.

    python examples/7_hybrid.py --out out/hybrid.png

A small model in the manner of Transfusion (Zhou et al., arXiv 2408.11039) learns, from a class, a word of four letters
and a picture in that word's colour. What it takes to guide both halves stands between the two lines below; nothing of
``models`` or ``tokenizers_vq`` is used. At scale 1 a share of words and pictures is wrong, because a share of the
training data is; guided, nearly all are right.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = ["cyan", "gold", "jade", "rose", "navy", "plum", "sand", "teal"]
COLOURS = torch.tensor(
    [
        [0, 255, 255],
        [255, 215, 0],
        [0, 168, 107],
        [255, 80, 127],
        [0, 0, 128],
        [142, 69, 133],
        [194, 178, 128],
        [0, 128, 128],
    ]
)
LETTERS, SIDE, NO_CLASS = 4, 4, len(WORDS)


class Transfusion(nn.Module):
    """One transformer over [class, letters, latents]: letters see what is before them, latents see everything."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.label = nn.Embedding(NO_CLASS + 1, width)
        self.letter = nn.Embedding(26, width)
        self.latent = nn.Linear(3 + 1, width)
        self.position = nn.Parameter(0.02 * torch.randn(1 + LETTERS + SIDE**2, width))
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True)
        self.body = nn.TransformerEncoder(layer, 3)
        self.to_letter, self.to_velocity = nn.Linear(width, 26), nn.Linear(width, 3)

    def hidden(self, label: Tensor, letters: Tensor, latents: Tensor | None = None) -> Tensor:
        """States of all positions: class, letters, and latents if there are any."""
        parts = [self.label(label), self.letter(letters)]
        parts += [] if latents is None else [self.latent(latents)]
        x = torch.cat(parts, 1)
        seen = torch.ones(x.shape[1], x.shape[1]).tril().bool()
        seen[1 + letters.shape[1] :] = True
        return self.body(x + self.position[: x.shape[1]], mask=~seen)

    def forward(self, x: dict[str, Tensor], label: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the letters (B, 4, 26) and velocity of the latents (B, 3, 4, 4)."""
        tokens = x["latents"].flatten(2).transpose(1, 2)
        time = t.view(-1, 1, 1).expand(-1, tokens.shape[1], 1)
        hidden = self.hidden(label, x["letters"], torch.cat([tokens, time], 2))
        velocity = self.to_velocity(hidden[:, 1 + LETTERS :])
        return self.to_letter(hidden[:, :LETTERS]), velocity.transpose(1, 2).reshape(
            x["latents"].shape
        )


def data(count: int, generator: torch.Generator) -> tuple[dict[str, Tensor], Tensor]:
    """Words and pictures with their class; for one in four the class is another's."""
    truth = torch.randint(len(WORDS), (count,), generator=generator)
    letters = torch.tensor([[ord(c) - ord("a") for c in word] for word in WORDS])[truth]
    colour = (COLOURS[truth] / 127.5 - 1).view(-1, 3, 1, 1).expand(-1, -1, SIDE, SIDE)
    latents = colour + 0.1 * torch.randn(colour.shape, generator=generator)
    other = torch.randint(len(WORDS), (count,), generator=generator)
    mistaken = torch.rand(count, generator=generator) < 0.25
    return {"letters": letters, "latents": latents}, torch.where(mistaken, other, truth)[:, None]


# --- what makes it guidable: from here ---
from unicfg import ConditionDropout, Guidance, sample_autoregressive, sample_diffusion  # noqa: E402
from unicfg.sampling import Uncached, straight  # noqa: E402


def train(steps: int, generator: torch.Generator) -> ConditionDropout:
    """Both losses on one model, under condition dropout."""
    model = ConditionDropout(Transfusion(), torch.tensor([NO_CLASS]), p=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        x, label = data(256, generator)
        noise, t = (
            torch.randn(x["latents"].shape, generator=generator),
            torch.rand(256, generator=generator),
        )
        level = t.view(-1, 1, 1, 1)
        noisy = {"letters": x["letters"], "latents": (1 - level) * x["latents"] + level * noise}
        logits, velocity = model(noisy, label, t)
        loss = F.cross_entropy(logits.transpose(1, 2), x["letters"])
        loss = loss + F.mse_loss(velocity, noise - x["latents"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def sample(
    model: ConditionDropout, label: Tensor, guidance: Guidance, seeds: list[int]
) -> tuple[Tensor, Tensor]:
    """Letters by guided logits, then latents by guided velocities: one ``Guidance`` for both."""
    network, null = model.model, model.null_condition
    words = Uncached(lambda ids, cond: network.to_letter(network.hidden(cond, ids)[:, -1]), LETTERS)
    letters = sample_autoregressive(words, label, uncond=null, guidance=guidance, seeds=seeds)

    def velocity(x: Tensor, cond: Tensor, t: Tensor) -> Tensor:
        own = letters.repeat(len(x) // len(letters), 1)  # both branches see the same word
        return network({"letters": own, "latents": x}, cond, t)[1]

    shape, options = (3, SIDE, SIDE), {"path": straight(), "space": "flow", "steps": 20}
    return letters, sample_diffusion(
        velocity, label, uncond=null, guidance=guidance, seeds=seeds, shape=shape, **options
    )


# --- to here ---


def correct(letters: Tensor, latents: Tensor, label: Tensor) -> tuple[float, float]:
    """Share of words that are spelled right, and of pictures whose nearest colour is the right one."""
    words = ["".join(chr(ord("a") + i) for i in row) for row in letters.tolist()]
    spelled = sum(word == WORDS[i] for word, i in zip(words, label.flatten().tolist(), strict=True))
    mean = latents.mean((2, 3))
    nearest = torch.cdist(mean, COLOURS / 127.5 - 1).argmin(1)
    return spelled / len(words), float((nearest == label.flatten()).float().mean())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, default=Path("out/hybrid.png"))
    options = parser.parse_args()
    torch.manual_seed(0)
    model = train(options.steps, torch.Generator().manual_seed(0))
    label = torch.arange(256).remainder(len(WORDS))[:, None]
    rows = []
    for s in (0.0, 1.0, 2.0, 4.0):
        letters, latents = sample(model, label, Guidance(s), list(range(256)))
        words, pictures = correct(letters, latents, label)
        print(f"s = {s:g}: {words:.0%} of the words and {pictures:.0%} of the pictures are right")
        rows.append(latents[:32].permute(0, 2, 3, 1))
    strip = torch.cat([torch.cat(list(row), 1) for row in rows], 0)
    pixels = ((strip.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(pixels)
    picture.resize((picture.width * 8, picture.height * 8), Image.Resampling.NEAREST).save(
        options.out
    )
    print(f"a row a scale, a patch an image: {options.out}")


if __name__ == "__main__":
    main()
