"""A model of one's own that writes and paints at once, guided by one ``guided_call`` a step.

    python examples/8_text_and_image.py --out out/text_and_image.png

A small network takes a prompt of one or two words, as embeddings with a mask, the text so far and a noisy picture, and
returns in one forward the logits of the next word and the velocity of the picture. It learns from data in which a third
of the prompts belong to something else, so that at scale 1 it follows about half of its prompts, and at 4 most of them.
Both outputs are guided by one ``Guidance`` in one batched pass [cond; uncond]. It takes half a minute on two cores.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional as F

from unicfg import ConditionDropout, Guidance, guided_call

COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 170, 80),
    "blue": (50, 90, 220),
    "yellow": (240, 200, 60),
}
PLACES = {
    "left": (slice(None), slice(0, 3)),
    "right": (slice(None), slice(3, 6)),
    "top": (slice(0, 3), slice(None)),
    "bottom": (slice(3, 6), slice(None)),
}
WORDS = [*COLOURS, *PLACES]
EMPTY, LENGTH, SIDE, DIM = (
    len(WORDS),
    2,
    6,
    16,
)  # id of a word not yet written; words; pixels; of an embedding
KINDS = len(COLOURS) * len(PLACES)
STEPS = 16


class TextAndImage(NamedTuple):
    """What the network returns: logits of the next word (B, 8) and velocity of the picture (B, 3, 6, 6)."""

    logits: Tensor
    velocity: Tensor


class Network(nn.Module):
    """Prompt, text so far and noisy picture in; next word and velocity out."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        pixels = 3 * SIDE**2
        self.prompt = nn.Sequential(nn.Linear(DIM, width), nn.GELU())
        self.word = nn.Embedding(EMPTY + 1, 32)
        self.body = nn.Sequential(
            nn.Linear(width + LENGTH * 32 + pixels + 1, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
        )
        self.to_word, self.to_clean = nn.Linear(width, len(WORDS)), nn.Linear(width, pixels)

    def forward(
        self, x: Tensor, cond: tuple[Tensor, Tensor], text: Tensor, t: Tensor
    ) -> TextAndImage:
        """Noisy x (B, 3, 6, 6), cond: embeddings (B, 2, 16) with a mask (B, 2), text (B, 2), t (B,), 1 is noise."""
        embeddings, mask = cond
        prompt = (self.prompt(embeddings) * mask[..., None]).sum(1)
        parts = [prompt, self.word(text).flatten(1), x.flatten(1), t[:, None]]
        hidden = self.body(torch.cat(parts, 1))
        # the noise is what x has beside the clean picture, which is easier to learn
        velocity = (x - self.to_clean(hidden).view_as(x)) / t.view(-1, 1, 1, 1)
        return TextAndImage(self.to_word(hidden), velocity)


def pictures() -> Tensor:
    """The clean picture of every kind (16, 3, 6, 6) in [-1, 1]: one half in the colour."""
    clean = torch.full((KINDS, 3, SIDE, SIDE), -0.8)
    for kind in range(KINDS):
        rows, columns = list(PLACES.values())[kind % 4]
        colour = torch.tensor(list(COLOURS.values())[kind // 4]) / 127.5 - 1
        clean[kind, :, rows, columns] = colour.view(3, 1, 1)
    return clean


def texts() -> Tensor:
    """The text of every kind (16, 2): its colour and its place."""
    kinds = torch.arange(KINDS)
    return torch.stack([kinds // 4, 4 + kinds % 4], 1)


def embed(kinds: Tensor, shown: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts as a frozen text encoder gives them: embeddings (B, 2, 16) with a mask (B, 2) of the words shown."""
    table = torch.randn(len(WORDS), DIM, generator=torch.Generator().manual_seed(1))
    return table[texts()[kinds]], shown


def train(steps: int, seed: int = 0) -> ConditionDropout:
    """Both losses on one network, under condition dropout."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    # without a prompt: one trained embedding, of which the mask shows the first row
    null = (torch.zeros(LENGTH, DIM), torch.tensor([True, False]))
    model = ConditionDropout(Network(), null, p=0.15, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    clean, words, batch = pictures(), texts(), 256
    for _ in range(steps):
        kinds = torch.randint(KINDS, (batch,), generator=generator)
        others = torch.randint(KINDS, (batch,), generator=generator)
        told = torch.where(torch.rand(batch, generator=generator) < 0.36, others, kinds)
        shown = torch.rand(batch, LENGTH, generator=generator) < 0.8
        shown[:, 0] |= ~shown[:, 1]
        noise = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
        t = 0.05 + 0.95 * torch.rand(batch, generator=generator)
        share = t.view(-1, 1, 1, 1)
        written = torch.randint(LENGTH, (batch,), generator=generator)
        text = words[kinds].masked_fill(torch.arange(LENGTH) >= written[:, None], EMPTY)
        x = (1 - share) * clean[kinds] + share * noise
        out = model(x, embed(told, shown), text, t)
        following = words[kinds].gather(1, written[:, None])[:, 0]
        loss = F.cross_entropy(out.logits, following)
        loss = loss + F.mse_loss(out.velocity, noise - clean[kinds])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def sample(
    model: ConditionDropout, cond: tuple[Tensor, Tensor], guidance: Guidance, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Texts (B, 2) and pictures (B, 3, 6, 6): a step of the picture each time, a word each eighth time."""
    generator, batch = torch.Generator().manual_seed(seed), len(cond[0])
    x = torch.randn(batch, 3, SIDE, SIDE, generator=generator)
    text = torch.full((batch, LENGTH), EMPTY)
    for i in range(STEPS):
        t = torch.full((batch,), 1 - i / STEPS)
        out = guided_call(model, cond, None, guidance, i / (STEPS - 1), inputs=(x, text, t))
        x = x - out.velocity / STEPS
        if i % (STEPS // LENGTH) == 0:
            drawn = torch.multinomial(out.logits.softmax(1), 1, generator=generator)
            text[:, i // (STEPS // LENGTH)] = drawn[:, 0]
    return text, x


def adherence(
    model: ConditionDropout, guidance: Guidance, count: int, seed: int = 0
) -> tuple[tuple[float, float], float]:
    """Shares of texts and of pictures that are what the prompt says, and of texts that say what the picture shows."""
    kinds = torch.arange(count) % KINDS
    text, x = sample(model, embed(kinds, torch.ones(count, LENGTH).bool()), guidance, seed)
    nearest = torch.cdist(x.flatten(1), pictures().flatten(1)).argmin(1)
    of_prompt = (text == texts()[kinds]).all(1), nearest == kinds
    agree = (text == texts()[nearest]).all(1)
    return tuple(float(right.float().mean()) for right in of_prompt), float(agree.float().mean())


def draw(model: ConditionDropout, scales: tuple[float, ...], file: Path) -> None:
    """A row a scale, a column a prompt; under each picture the text that was written with it."""
    kinds = torch.tensor([0, 5, 10, 15, 2, 7, 8, 13])
    cell, line = 96, 16
    sheet = Image.new("RGB", (cell * (len(kinds) + 1), (cell + line) * len(scales) + line), "white")
    pen = ImageDraw.Draw(sheet)
    for column, kind in enumerate(kinds.tolist()):
        prompt = " ".join(WORDS[i] for i in texts()[kind].tolist())
        pen.text(((column + 1) * cell + 4, 2), prompt, fill="black")
    for row, s in enumerate(scales):
        top = line + row * (cell + line)
        pen.text((4, top + cell // 2), f"s = {s:g}", fill="black")
        cond = embed(kinds, torch.ones(len(kinds), LENGTH).bool())
        text, x = sample(model, cond, Guidance(s), seed=3)
        pixels = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
        for column in range(len(kinds)):
            tile = Image.fromarray(pixels[column].numpy()).resize(
                (cell - 4, cell - 4), Image.Resampling.NEAREST
            )
            left = (column + 1) * cell
            sheet.paste(tile, (left, top))
            words = " ".join(WORDS[i] for i in text[column].tolist())
            right = torch.equal(text[column], texts()[kinds[column]])
            pen.text((left + 4, top + cell - 3), words, fill="black" if right else "red")
    file.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(file)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2500, help="of training")
    parser.add_argument("--out", type=Path, default=Path("out/text_and_image.png"))
    options = parser.parse_args()
    model, scales = train(options.steps), (0.0, 1.0, 2.0, 4.0, 8.0)
    for s in scales:
        (text, picture), agree = adherence(model, Guidance(s), 960)
        print(
            f"s = {s:g}: {text:.0%} of the texts and {picture:.0%} of the pictures are what the prompt says, "
            f"{agree:.0%} of the texts say what the picture shows"
        )
    draw(model, scales, options.out)
    print(f"a row a scale, a column a prompt: {options.out}")


if __name__ == "__main__":
    main()
