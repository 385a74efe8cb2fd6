"""From a recipe to a finished pipeline: data, image tokenizer, captions, codes, model.

Each stage leaves its result in the recipe's folder, and a resumed run takes it from there.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from models import ClassLabels, TextToImage, TextTokenizer, TokenTransformer, TokenTransformerConfig
from models.labels import PromptEncoder
from tokenizers_vq import (
    AdversarialLoss,
    VQTokenizer,
    VQTokenizerConfig,
    codebook_statistics,
    reconstruction_loss,
    to_float,
    to_images,
)
from tokenizers_vq.hub import (
    WEIGHTS,
    read_json,
    save_part,
    write_atomically,
    write_text_atomically,
)
from unicfg.guidance import Guidance
from unicfg.pictures import grid, save_picture
from unicfg.training.data import ImageSet, read_folder
from unicfg.training.dropout import ConditionDropout
from unicfg.training.optimize import fit
from unicfg.training.recipe import (
    LOGGING_SETTINGS,
    DataRecipe,
    ModelRecipe,
    Recipe,
    TokenizerRecipe,
)
from unicfg.training.shapes import make_shapes

SAMPLE_SCALES = (1.0, 3.0)
SAMPLE_PROMPTS = 8  # captions drawn in the sample grids where the recipe names none
FREE_SETTINGS = LOGGING_SETTINGS | {"out", "prompts"}  # may differ when a run is resumed


def train(recipe: Recipe, *, resume: bool = False) -> TextToImage:
    """Run every stage of a recipe and save the pipeline into ``recipe.out``.

    Args:
        recipe: see :mod:`unicfg.training.recipe`.
        resume: go on where an interrupted run of the same recipe stopped.

    Returns:
        the trained pipeline.

    Raises:
        ValueError: if the recipe does not fit its data, or ``recipe.out`` holds another run.
        FileNotFoundError: if the data is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, expected 1: "
            "training on several processes is not supported yet"
        )
    out = Path(recipe.out)
    data = load_data(recipe.data)
    train_set, val_set = data.split(recipe.data.validation)
    print(f"{len(train_set)} training and {len(val_set)} validation images")
    if not len(train_set) or not len(val_set):
        raise ValueError(
            f"{len(train_set)} training and {len(val_set)} validation images, "
            "expected at least one of each: add images or change data.validation"
        )
    # all that can be refused is refused before the folder is claimed and the first step taken
    tokenizer_config = _tokenizer_config(recipe.tokenizer, recipe.data.image_size)
    text: PromptEncoder
    if recipe.text.kind == "classes":
        text = ClassLabels(sorted(set(data.captions)))
    else:
        text = TextTokenizer.train(train_set.captions, recipe.text.vocabulary, recipe.text.length)
    model_config = _model_config(recipe, tokenizer_config, text)
    _claim_folder(recipe, _fingerprint(data), out, resume)

    tokenizer = _train_tokenizer(recipe, tokenizer_config, train_set, val_set, out, resume)
    codes = [
        _codes(tokenizer, text, part, out / "codes" / f"{name}.safetensors", recipe.model, crops)
        for name, part, crops in (
            ("train", train_set, recipe.model.crops),
            ("validation", val_set, 1),
        )
    ]
    prompts = list(recipe.prompts) or val_set.captions[:SAMPLE_PROMPTS]
    return _train_model(recipe, model_config, tokenizer, text, codes, prompts, out, resume)


def load_data(recipe: DataRecipe) -> ImageSet:
    """The captioned images that a recipe names.

    Raises:
        ValueError: if a folder is expected and none is named.
    """
    if recipe.source == "shapes":
        return make_shapes(recipe.count, size=recipe.image_size, wrong=recipe.wrong)
    if not recipe.path:
        raise ValueError("data.path is empty, expected the folder of the captioned images")
    return read_folder(recipe.path, recipe.image_size)


def _fingerprint(data: ImageSet) -> str:
    """A hash of images and captions, so that a run is not resumed on other data."""
    digest = hashlib.sha256(data.images.numpy().tobytes())
    digest.update(json.dumps(data.captions).encode())
    return digest.hexdigest()


def _claim_folder(recipe: Recipe, fingerprint: str, out: Path, resume: bool) -> None:
    """Write recipe and data hash beside the results; refuse to mix two runs in one folder."""
    file = out / "recipe.json"
    settings = json.loads(json.dumps({**asdict(recipe), "data_fingerprint": fingerprint}))
    if file.exists() and not resume:
        raise ValueError(f"{out} holds a run already: resume it, or choose another folder as out")
    if file.exists():
        before, now = _flat(read_json(file)), _flat(settings)
        changed = [
            f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
            for key in sorted(before.keys() | now.keys())
            if key.split("/")[-1] not in FREE_SETTINGS and before.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(f"cannot resume {out}: {'; '.join(changed)}")
    write_text_atomically(json.dumps(settings, indent=2) + "\n", file)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with paths as keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


class _Images(Dataset[Tensor]):
    """uint8 images, made floats in [-1, 1] as they are asked for."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return to_float(self.images[index])


def _train_tokenizer(
    recipe: Recipe,
    config: VQTokenizerConfig,
    train_set: ImageSet,
    val_set: ImageSet,
    out: Path,
    resume: bool,
) -> VQTokenizer:
    """Train the image tokenizer, or load the finished one from ``out/tokenizer``."""
    if resume and (out / "tokenizer" / WEIGHTS).exists():
        return VQTokenizer.from_pretrained(out / "tokenizer")
    settings = recipe.tokenizer
    set_seed(settings.training.seed)
    tokenizer = VQTokenizer(config)
    held_out = to_float(val_set.images[:512])
    loss = _TokenizerLoss(tokenizer, settings)

    def report(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, _TokenizerLoss)
        values, picture = evaluate_tokenizer(average.tokenizer.eval(), held_out)
        save_picture(picture, out / "pictures" / f"tokenizer-{step:06d}.png")
        return values

    trained = fit(
        loss,
        _Images(train_set.images),
        lambda module, batch, step: module(batch, step),
        settings.training,
        out / "logs" / "tokenizer",
        resume=resume,
        report=report,
    )
    assert isinstance(trained, _TokenizerLoss)
    tokenizer = trained.tokenizer.cpu().eval()
    tokenizer.fit_latent_statistics(to_float(train_set.images[:2048]))
    save_part(tokenizer, out / "tokenizer")
    return tokenizer


def _tokenizer_config(recipe: TokenizerRecipe, image_size: int) -> VQTokenizerConfig:
    shared = VQTokenizerConfig.__dataclass_fields__.keys() & asdict(recipe).keys()
    return VQTokenizerConfig(
        image_size=image_size, **{name: getattr(recipe, name) for name in shared}
    )


class _TokenizerLoss(nn.Module):
    """The tokenizer with its losses: one module, so that one loop and one optimizer train all of it."""

    def __init__(self, tokenizer: VQTokenizer, recipe: TokenizerRecipe) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.adversarial = AdversarialLoss(recipe.adversarial) if recipe.adversarial else None
        self.adversarial_from = recipe.training.steps // 2
        self.flip = recipe.flip

    def forward(self, images: Tensor, step: int) -> Tensor:
        """Scalar loss of images (B, 3, H, W)."""
        if self.flip:
            mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < 0.5
            images = torch.where(mirrored, images.flip(-1), images)
        output, quantized = self.tokenizer(images)
        loss = reconstruction_loss(output, images) + quantized.loss
        if self.adversarial is not None and step >= self.adversarial_from:
            last_layer = self.tokenizer.decoder.last_layer
            # the critic must not learn from the decoder's loss, nor the decoder from the critic's
            self.adversarial.requires_grad_(False)
            loss = loss + self.adversarial.generator(output, loss, last_layer)
            self.adversarial.requires_grad_(True)
            loss = loss + self.adversarial.critic(output, images)
        return loss


@torch.no_grad()
def evaluate_tokenizer(tokenizer: VQTokenizer, images: Tensor) -> tuple[dict[str, float], Any]:
    """PSNR in dB, codebook usage and perplexity on images (N, 3, H, W), and a picture of some.

    The picture has originals and reconstructions in alternating rows.
    """
    device = tokenizer.latent_mean.device
    ids = torch.cat([tokenizer.encode(batch.to(device)) for batch in images.split(64)])
    decoded = torch.cat([tokenizer.decode(batch).cpu() for batch in ids.split(64)])
    error = ((decoded - images) / 2).square().mean((1, 2, 3))
    statistics = codebook_statistics(ids.cpu(), tokenizer.codebook_size)
    values = {
        "psnr": float((-10 * error.clamp(min=1e-10).log10()).mean()),
        "codebook_usage": statistics.usage,
        "codebook_perplexity": statistics.perplexity,
    }
    shown = [to_images(part[:32]) for part in (images, decoded)]
    rows = [part[i : i + 8] for i in range(0, len(shown[0]), 8) for part in shown]
    return values, grid(rows, cell=96)


def _model_config(
    recipe: Recipe, tokenizer: VQTokenizerConfig, text: PromptEncoder
) -> TokenTransformerConfig:
    settings = recipe.model
    return TokenTransformerConfig(
        codebook_size=tokenizer.num_codes,
        grid=recipe.data.image_size // tokenizer.factor,
        condition_vocabulary=text.vocabulary,
        condition_length=text.length,
        width=settings.width,
        depth=settings.depth,
        heads=settings.heads,
        dropout=settings.dropout,
    )


def _codes(
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    images: ImageSet,
    file: Path,
    recipe: ModelRecipe,
    crops: int,
) -> TensorDataset:
    """Image tokens and text tokens of a data set, made once and kept with a mark of what made them."""
    captions = text.encode(images.captions).repeat(crops, 1)
    mark = _mark(tokenizer, images, captions, recipe.shift)
    if file.exists():
        with safe_open(file, framework="pt") as handle:
            if (handle.metadata() or {}).get("made_from") == mark:
                return TensorDataset(handle.get_tensor("ids"), handle.get_tensor("text"))
    generator = torch.Generator().manual_seed(recipe.training.seed)
    ids = []
    for crop in range(crops):
        for batch in images.images.split(64):
            shift = recipe.shift if crop else 0
            ids.append(tokenizer.encode(shifted(to_float(batch), shift, generator)).flatten(1))
    tensors = {"ids": torch.cat(ids), "text": captions}
    write_atomically(tensors, file, {"made_from": mark})
    return TensorDataset(tensors["ids"], captions)


def shifted(images: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """Images (B, 3, H, W), each moved by up to ``most`` pixels both ways, its border repeated behind it.

    A model that sees an image in one position only learns its tokens by heart and leans on them, not on the
    caption; several encodings of each image are the remedy (the ten-crop codes of LlamaGen, arXiv 2406.06525).
    """
    if most == 0:
        return images
    height, width = images.shape[2:]
    padded = F.pad(images, (most,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * most + 1, (len(images), 2), generator=generator).tolist()
    moved = [
        image[:, y : y + height, x : x + width]
        for image, (y, x) in zip(padded, offsets, strict=True)
    ]
    return torch.stack(moved)


def _mark(tokenizer: VQTokenizer, images: ImageSet, captions: Tensor, shift: int) -> str:
    """A hash of the tokenizer, the data and how it is encoded: stale codes are not used."""
    digest = hashlib.sha256(f"shift {shift}".encode())
    for tensor in (*tokenizer.state_dict().values(), images.images, captions):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def token_loss(model: nn.Module, ids: Tensor, cond: Tensor) -> Tensor:
    """Mean cross-entropy of image tokens (B, L) under a token model, in nats a token."""
    logits = model(ids, cond)
    return F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())


def _train_model(
    recipe: Recipe,
    config: TokenTransformerConfig,
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    codes: list[TensorDataset],
    prompts: list[str],
    out: Path,
    resume: bool,
) -> TextToImage:
    settings, (train_codes, val_codes) = recipe.model, codes
    set_seed(settings.training.seed)
    wrapped = ConditionDropout(
        TokenTransformer(config),
        text.null_condition,
        settings.condition_dropout,
        seed=settings.training.seed,
    )

    def report(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, ConditionDropout)
        values = _validation_losses(average, val_codes)
        pipe = TextToImage(text, average, tokenizer.to(_device(average)))
        save_picture(
            _samples(pipe, prompts), out / "pictures" / f"{settings.family}-{step:06d}.png"
        )
        return values

    trained = fit(
        wrapped,
        train_codes,
        lambda module, batch, step: token_loss(module, *batch),
        settings.training,
        out / "logs" / settings.family,
        resume=resume,
        report=report,
    )
    assert isinstance(trained, ConditionDropout)
    pipe = TextToImage(text, trained.cpu(), tokenizer.cpu(), settings.family)
    pipe.save_pretrained(out)
    return pipe


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def _validation_losses(wrapped: ConditionDropout, codes: TensorDataset) -> dict[str, float]:
    """Loss with and without the condition; their difference is what guidance has to work with."""
    device = _device(wrapped)
    ids, cond = (tensor[:512].to(device) for tensor in codes.tensors)
    null = wrapped.null_condition
    assert isinstance(null, Tensor)
    return {
        "validation_loss": float(token_loss(wrapped.model, ids, cond)),
        "validation_loss_uncond": float(token_loss(wrapped.model, ids, null.expand_as(cond))),
    }


def _samples(pipe: TextToImage, prompts: list[str]) -> Any:
    """A grid of prompts by scales, the same seed in every cell of a row."""
    columns = []
    for s in SAMPLE_SCALES:
        images = pipe(prompts, seeds=list(range(len(prompts))), guidance=Guidance(s))
        columns.append(images)
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"s = {s:g}" for s in SAMPLE_SCALES]
    return grid(rows, row_labels=prompts, column_labels=labels)
