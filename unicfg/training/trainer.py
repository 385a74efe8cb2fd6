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
from tqdm.auto import tqdm

from models import ClassLabels, TextToImage, TextTokenizer
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
from unicfg.training.families import (
    Loss,
    make_network,
    step_generator,
    training_data,
    training_loss,
)
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
    set_seed(recipe.model.training.seed)
    network = make_network(recipe.model, tokenizer_config, text)
    _claim_folder(recipe, _fingerprint(data), out, resume)

    tokenizer = _train_tokenizer(recipe, tokenizer_config, train_set, val_set, out, resume)
    codes = []
    for name, part, crops in (("train", train_set, recipe.model.crops), ("validation", val_set, 1)):
        file = out / "codes" / f"{name}-{crops}x{recipe.model.shift}.safetensors"
        codes.append(_codes(tokenizer, text, part, file, recipe.model, crops))
    prompts = list(recipe.prompts) or val_set.captions[:SAMPLE_PROMPTS]
    return _train_model(recipe, network, tokenizer, text, codes, prompts, out, resume)


def load_data(recipe: DataRecipe) -> ImageSet:
    """The captioned images that a recipe names.

    Raises:
        ValueError: if a folder is expected and none is named.
    """
    if recipe.source == "shapes":
        return make_shapes(
            recipe.count,
            size=recipe.image_size,
            wrong=recipe.wrong,
            unrelated=recipe.unrelated,
        )
    if not recipe.path:
        raise ValueError("data.path is empty, expected the folder of the captioned images")
    return read_folder(recipe.path, recipe.image_size)


def _fingerprint(data: ImageSet) -> str:
    """A hash of images and captions, so that a run is not resumed on other data."""
    digest = hashlib.sha256(data.images.numpy().tobytes())
    digest.update(json.dumps(data.captions).encode())
    return digest.hexdigest()


def _claim_folder(recipe: Recipe, fingerprint: str, out: Path, resume: bool) -> None:
    """Write recipe and data hash beside the results; refuse to mix two runs in one folder.

    The families of a folder share data, tokenizer and text, so another family may be added to it at any time.
    """
    file = out / "recipe.json"
    settings = json.loads(json.dumps({**asdict(recipe), "data_fingerprint": fingerprint}))
    family, model = recipe.model.family, settings.pop("model")
    held = read_json(file) if file.exists() else {"models": {}}
    models = held.pop("models", {})
    if family in models and not resume:
        raise ValueError(
            f"{out} holds a run of the family {family} already: resume it, or choose another folder"
        )
    before, now = _flat(held), _flat(settings)
    if family in models:
        before |= _flat({"model": models[family]})
        now |= _flat({"model": model})
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if key.split("/")[-1] not in FREE_SETTINGS and before.get(key) != now.get(key)
    ]
    if held and changed:
        raise ValueError(f"cannot add to {out} or resume it: {'; '.join(changed)}")
    settings["models"] = models | {family: model}
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
    if (out / "tokenizer" / WEIGHTS).exists():
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


def _codes(
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    images: ImageSet,
    file: Path,
    recipe: ModelRecipe,
    crops: int,
) -> dict[str, Tensor]:
    """Image tokens "ids", "latents" and "text" of a data set, made once and kept with a mark of what made them."""
    captions = text.encode(images.captions).repeat(crops, 1)
    mark = _mark(tokenizer, images, captions, recipe.shift)
    if file.exists():
        with safe_open(file, framework="pt") as handle:
            if (handle.metadata() or {}).get("made_from") == mark:
                return {key: handle.get_tensor(key) for key in list(handle.keys())}
    generator = torch.Generator().manual_seed(recipe.training.seed)
    ids, latents = [], []
    batches = [(crop, batch) for crop in range(crops) for batch in images.images.split(64)]
    for crop, batch in tqdm(batches, desc="encoding images"):
        pixels = shifted(to_float(batch), recipe.shift if crop else 0, generator)
        ids.append(tokenizer.encode(pixels).flatten(1))
        latents.append(tokenizer.encode_latents(pixels))
    tensors = {"ids": torch.cat(ids), "latents": torch.cat(latents), "text": captions}
    write_atomically(tensors, file, {"made_from": mark})
    return tensors


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


def _train_model(
    recipe: Recipe,
    network: nn.Module,
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    codes: list[dict[str, Tensor]],
    prompts: list[str],
    out: Path,
    resume: bool,
) -> TextToImage:
    settings, family = recipe.model, recipe.model.family
    seed = settings.training.seed
    train_codes, val_codes = (
        TensorDataset(part[training_data(family)], part["text"]) for part in codes
    )
    set_seed(seed)
    wrapped = ConditionDropout(network, text.null_condition, settings.condition_dropout, seed=seed)
    loss = training_loss(settings, network)

    def report(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, ConditionDropout)
        values = _validation_losses(average, loss, val_codes)
        pipe = TextToImage(text, average, tokenizer.to(_device(average)), family)
        save_picture(_samples(pipe, prompts), out / "pictures" / f"{family}-{step:06d}.png")
        return values

    trained = fit(
        wrapped,
        train_codes,
        # a function of seed and step alone, so that a resumed run draws what the uninterrupted one would have
        lambda module, batch, step: loss(module, batch[0], batch[1], step_generator(seed, step)),
        settings.training,
        out / "logs" / family,
        resume=resume,
        report=report,
    )
    assert isinstance(trained, ConditionDropout)
    pipe = TextToImage(text, trained.cpu(), tokenizer.cpu(), family)
    pipe.save_pretrained(out)
    return pipe


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def _validation_losses(
    wrapped: ConditionDropout, loss: Loss, codes: TensorDataset
) -> dict[str, float]:
    """Loss with and without the condition; their difference is what guidance has to work with."""
    device = _device(wrapped)
    data, cond = (tensor[:512].to(device) for tensor in codes.tensors)
    null = wrapped.null_condition
    assert isinstance(null, Tensor)
    values = {}
    for name, condition in (("", cond), ("_uncond", null.expand_as(cond))):
        generator = torch.Generator().manual_seed(0)  # the same noise for both
        values[f"validation_loss{name}"] = float(loss(wrapped.model, data, condition, generator))
    return values


def _samples(pipe: TextToImage, prompts: list[str]) -> Any:
    """A grid of prompts by scales, the same seed in every cell of a row."""
    columns = []
    for s in SAMPLE_SCALES:
        images = pipe(prompts, seeds=list(range(len(prompts))), guidance=Guidance(s))
        columns.append(images)
    rows = [list(row) for row in zip(*columns, strict=True)]
    labels = [f"s = {s:g}" for s in SAMPLE_SCALES]
    return grid(rows, row_labels=prompts, column_labels=labels)
