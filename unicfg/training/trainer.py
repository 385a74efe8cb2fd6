"""From a recipe to a finished pipeline: images, image tokenizer, codes, model.

Each stage leaves its result in the recipe's folder, and a resumed run takes it from there. Where there are several
processes, all of them run every stage, and the first one writes what they share.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from models import ClassLabels, TextToImage, TextTokenizer
from models.folders import find_tokenizer
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
from tokenizers_vq.files import read_json, write_text_atomically
from tokenizers_vq.hub import WEIGHTS, save_part
from unicfg.guidance import Guidance
from unicfg.pictures import grid, save_picture
from unicfg.processes import join_processes
from unicfg.training.checkpoint import Checkpoints
from unicfg.training.dropout import WHOLE, ConditionDropout, Part
from unicfg.training.encode import encode_images, hash_of
from unicfg.training.families import (
    Loss,
    make_network,
    step_generator,
    step_seed,
    training_data,
    training_loss,
)
from unicfg.training.optimize import check_batches, fit
from unicfg.training.recipe import (
    LOGGING_SETTINGS,
    Recipe,
    TextRecipe,
    TokenizerRecipe,
)
from unicfg.training.shards import Shards
from unicfg.training.sources import (
    images_made_from,
    open_source,
    prepare_images,
    read_captions,
)

SAMPLE_SCALES = (1.0, 3.0)
# the tokenizer is measured on so many pixels, or on a batch of large images
BATCH, SHOWN_PIXELS = 64, 1 << 24
SAMPLE_PROMPTS = 8  # captions drawn in the sample grids where the recipe names none
# may differ when a run is resumed; the data may have moved, its images are in the run
FREE_SETTINGS = LOGGING_SETTINGS | {"out", "prompts", "data/path", "data/workers"}
PRETRAINED = "tokenizer/pretrained"  # may differ, too, as long as it is the same tokenizer
LEFTOVER = re.compile(r"\..+\.\d+\.tmp")  # as write_atomically names what is not whole yet
LOST = re.compile("gloo|Connection (closed|reset)|Broken pipe")  # what is said of an ended process
STAGES = ("images", "tokenizer", "codes", "model")


def train(
    recipe: Recipe, *, resume: bool = False, until: str = "model", fsdp: bool = False
) -> TextToImage | None:
    """Run every stage of a recipe and save the pipeline into ``recipe.out``.

    Args:
        recipe: see :mod:`unicfg.training.recipe`.
        resume: go on where an interrupted run of the same recipe stopped.
        until: the last stage to run: "images" decodes the data once, "tokenizer" trains the image tokenizer, "codes"
            encodes all images with it, "model" trains the model.
        fsdp: split the model among the processes, see :func:`~unicfg.training.optimize.fit`.

    Returns:
        the trained pipeline; None where the run ends before the model.

    Raises:
        ValueError: if the recipe does not fit its data, or ``recipe.out`` holds another run.
        FileNotFoundError: if the data is not there.
        OSError: if something cannot be written, or another process is lost; what is finished stays.
    """
    if until not in STAGES:
        raise ValueError(f"until is {until!r}, expected one of {', '.join(STAGES)}")
    if not recipe.out.strip():
        raise ValueError("out is empty, expected a folder for the run")
    try:
        return _train(recipe, resume, until, fsdp)
    except RuntimeError as error:
        lost = isinstance(error, torch.distributed.DistError) or LOST.search(str(error))
        if join_processes().num_processes > 1 and lost:
            raise ConnectionError(
                f"another process has ended ({error}): what is finished, and the last whole checkpoint, is in "
                f"{recipe.out}; --resume goes on from there"
            ) from error
        raise


def _train(recipe: Recipe, resume: bool, until: str, fsdp: bool) -> TextToImage | None:
    processes = join_processes()
    out, images = Path(recipe.out), Path(recipe.out) / "images"
    # all that can be refused is refused before the folder is claimed and the first image read
    given = _given_tokenizer(recipe, out)
    tokenizer_config = (
        _tokenizer_config(recipe.tokenizer, recipe.data.image_size)
        if given is None
        else given.config
    )
    _check_model(recipe, tokenizer_config)
    if until == "model":
        check_batches(recipe.model.training)
    if given is None and until != "images" and not (out / "tokenizer" / WEIGHTS).exists():
        check_batches(recipe.tokenizer.training)
    made_from, source = images_made_from(images), None
    try:
        source = open_source(recipe.data)
        made_from = source.made_from
    except FileNotFoundError:
        if made_from is None or not resume:
            raise
        if processes.is_main_process:
            print(f"the data is not at {recipe.data.path}: its images in {images} are taken")
    _claim_folder(recipe, made_from, given, out, resume)
    if processes.is_main_process:
        for leftover in out.rglob(".*.tmp"):  # of processes that were killed while they wrote
            if LEFTOVER.fullmatch(leftover.name) and leftover.is_file():
                leftover.unlink()
    processes.wait_for_everyone()

    if source is not None:
        prepare_images(source, images, recipe.data.validation, recipe.data.workers)
    count = {part: len(Shards(images / part, ())) for part in ("train", "validation")}
    if processes.is_main_process:
        print(f"{count['train']} training and {count['validation']} validation images")
    if not count["train"] or not count["validation"]:
        raise ValueError(
            f"{count['train']} training and {count['validation']} validation images, "
            "expected at least one of each: with other images or another data.validation, in another folder"
        )
    if until == "images":
        return None
    if given is None:
        tokenizer = _train_tokenizer(recipe, tokenizer_config, images, out, resume)
    else:
        tokenizer = _keep_tokenizer(given, out)
    if until == "tokenizer":
        return None
    tokenizer.to(processes.device)
    text = _text(recipe.text, images)
    codes = []
    for part, crops in (("train", recipe.model.crops), ("validation", 1)):
        # what makes other codes is in the name: families that differ in it have codes of their own
        # (a recipe has shifts where it has crops, and nowhere else)
        shift, seed = (recipe.model.shift, recipe.model.training.seed) if crops > 1 else (0, 0)
        name = f"{part}-{crops}x{shift}" + (f"-seed{seed}" if seed else "")
        codes.append(
            encode_images(
                tokenizer,
                text,
                images,
                part,
                out / "codes" / name,
                crops=crops,
                shift=shift,
                seed=seed,
            )
        )
    if until == "codes":
        return None
    captions = next(own for own in read_captions(images, "validation") if own)
    prompts = list(recipe.prompts) or captions[:SAMPLE_PROMPTS]
    _claim_model(recipe, out)
    set_seed(recipe.model.training.seed)
    network = make_network(recipe.model, tokenizer_config, text)
    return _train_model(recipe, network, tokenizer, text, codes, prompts, out, resume, fsdp)


def _check_model(recipe: Recipe, tokenizer: VQTokenizerConfig) -> None:
    """Refuse settings of text and model before any data is read.

    Raises:
        ValueError: names the setting.
    """
    text: PromptEncoder = ClassLabels(["one"])
    if recipe.text.kind == "bpe":
        text = TextTokenizer.train([], recipe.text.vocabulary, recipe.text.length)
    make_network(recipe.model, tokenizer, text)


def _text(recipe: TextRecipe, images: Path) -> PromptEncoder:
    """What turns captions into conditions, made from the captions themselves."""
    training = (caption for some in read_captions(images, "train") for caption in some)
    if recipe.kind == "bpe":
        return TextTokenizer.train(training, recipe.vocabulary, recipe.length)
    names = set(training)
    for some in read_captions(images, "validation"):
        names.update(some)
    return ClassLabels(sorted(names))


def _claim_folder(
    recipe: Recipe, made_from: str, given: VQTokenizer | None, out: Path, resume: bool
) -> None:
    """Write recipe and data hash beside the results; refuse to mix two runs in one folder.

    The families of a folder share data, tokenizer and text, so another family may be added once one is there. Until then
    a run is resumed, and the settings of its model are open until :func:`_claim_model`.
    """
    file = out / "recipe.json"
    settings = json.loads(json.dumps({**asdict(recipe), "data_made_from": made_from}))
    family, model = recipe.model.family, settings.pop("model")
    held = read_json(file) if file.exists() else {"models": {}}
    models = held.pop("models", {})
    if held and (family in models or not models) and not resume:
        what = f"a run of the family {family}" if models else "a run that has no model yet"
        raise ValueError(f"{out} already holds {what}: resume it, or choose another folder")
    before, now = _flat(held), _flat(settings)
    if family in models and _has_begun(out, family):  # else nothing is lost by other settings
        before |= _flat({"model": models[family]})
        now |= _flat({"model": model})
    if given is not None and before.get(PRETRAINED):
        _check_still_given(recipe, given, before[PRETRAINED], out)
        before[PRETRAINED] = now[PRETRAINED]
    # what a later release has added was as it is by default
    usual = _flat(json.loads(json.dumps(asdict(Recipe(out="")))))
    was = {key: before.get(key, usual.get(key)) for key in before.keys() | now.keys()}
    changed = [
        f"{key} was {value!r}, now {now.get(key)!r}"
        for key, value in sorted(was.items())
        if not {key, key.split("/")[-1]} & FREE_SETTINGS and value != now.get(key)
    ]
    if held and changed:
        raise ValueError(f"cannot add to {out} or resume it: {'; '.join(changed)}")
    settings["models"] = models
    join_processes().wait_for_everyone()  # all of them have read the file
    if join_processes().is_main_process:
        write_text_atomically(json.dumps(settings, indent=2) + "\n", file)


def _has_begun(out: Path, family: str) -> bool:
    """Whether there is anything of a model that its settings could contradict."""
    checkpoints = Checkpoints(out / "logs" / family / "checkpoints")
    return bool(checkpoints.files()) or (out / family / WEIGHTS).exists()


def _claim_model(recipe: Recipe, out: Path) -> None:
    """Write the settings of the model, which is about to be trained, beside those of the run."""
    if join_processes().is_main_process:
        settings = read_json(out / "recipe.json")
        settings["models"][recipe.model.family] = json.loads(json.dumps(asdict(recipe.model)))
        write_text_atomically(json.dumps(settings, indent=2) + "\n", out / "recipe.json")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with paths as keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


class _Images(Dataset[Tensor]):
    """Pixels on disk, made floats in [-1, 1] as they are asked for."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [to_float(image) for (image,) in self.shards.__getitems__(indices)]


class _Codes(Dataset[tuple[Tensor, ...]]):
    """What a family is trained on: (ids or latents, condition ids)."""

    def __init__(self, folder: Path, data: str) -> None:
        self.shards = Shards(folder, (data, "text"))

    def __len__(self) -> int:
        return len(self.shards)

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, ...]]:
        return [
            (data if data.is_floating_point() else data.long(), text.long())
            for data, text in self.shards.__getitems__(indices)
        ]


def _train_tokenizer(
    recipe: Recipe, config: VQTokenizerConfig, images: Path, out: Path, resume: bool
) -> VQTokenizer:
    """Train the image tokenizer, or load the finished one from ``out/tokenizer``."""
    processes = join_processes()
    if _holds_tokenizer(out):
        return VQTokenizer.from_pretrained(out / "tokenizer")
    processes.wait_for_everyone()  # or one could find what another has just written
    settings = recipe.tokenizer
    set_seed(settings.training.seed)
    tokenizer = VQTokenizer(config)
    train_set, val_set = (Shards(images / part, ("images",)) for part in ("train", "validation"))
    most = max(BATCH, SHOWN_PIXELS // config.image_size**2)  # images that are in memory at once
    held_out = to_float(val_set.first(min(512, most))[0])
    loss = _TokenizerLoss(tokenizer, settings)

    def report(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, _TokenizerLoss)
        values, picture = evaluate_tokenizer(average.tokenizer.eval(), held_out)
        save_picture(picture, out / "pictures" / f"tokenizer-{step:06d}.png")
        return values

    trained = fit(
        loss,
        _Images(train_set),
        lambda module, batch, step, part: module(batch, step),
        settings.training,
        out / "logs" / "tokenizer",
        resume=resume,
        report=report,
        workers=recipe.data.workers,
        find_unused=loss.adversarial is not None,
    )
    assert isinstance(trained, _TokenizerLoss)
    tokenizer = trained.tokenizer.cpu().eval()
    if processes.is_main_process:
        tokenizer.fit_latent_statistics(to_float(train_set.first(min(2048, most))[0]), BATCH)
        save_part(tokenizer, out / "tokenizer")
    processes.wait_for_everyone()
    # one for all processes, to the last bit
    return VQTokenizer.from_pretrained(out / "tokenizer")


def _holds_tokenizer(out: Path) -> bool:
    return (out / "tokenizer" / WEIGHTS).exists()


def _given_tokenizer(recipe: Recipe, out: Path) -> VQTokenizer | None:
    """The tokenizer that the recipe takes as it is, if any; the copy that an earlier run has made of it comes first.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is damaged, or for images of another size.
    """
    if not recipe.tokenizer.pretrained:
        return None
    folder = (
        out / "tokenizer" if _holds_tokenizer(out) else find_tokenizer(recipe.tokenizer.pretrained)
    )
    tokenizer = VQTokenizer.from_pretrained(folder)
    size = tokenizer.config.image_size
    if size != recipe.data.image_size:
        raise ValueError(
            f"image_size is {recipe.data.image_size}, expected {size}, which the tokenizer in {folder} is for"
        )
    return tokenizer


def _check_still_given(recipe: Recipe, given: VQTokenizer, name_before: str, out: Path) -> None:
    """Refuse another tokenizer than the one that the run has copied; it may lie elsewhere now.

    Until there is a copy nothing was made with it, and any will do.

    Raises:
        FileNotFoundError: if there is none where the recipe says.
        ValueError: if its configuration or weights differ from those of the copy.
    """
    name = recipe.tokenizer.pretrained
    if name == name_before or not _holds_tokenizer(out):
        return
    if hash_of(VQTokenizer.from_pretrained(find_tokenizer(name))) != hash_of(given):
        raise ValueError(
            f"cannot add to {out} or resume it: {PRETRAINED} was {name_before!r}, whose copy is in "
            f"{out / 'tokenizer'}, and the one at {name!r} is another: name the one that it was, or choose another folder"
        )


def _keep_tokenizer(tokenizer: VQTokenizer, out: Path) -> VQTokenizer:
    """Make a tokenizer part of the run, if it is not yet."""
    processes = join_processes()
    if processes.is_main_process and not _holds_tokenizer(out):
        save_part(tokenizer, out / "tokenizer")
    processes.wait_for_everyone()
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
        if join_processes().device.type == "cpu":  # whose convolutions are fastest in this layout
            for parameter in tokenizer.parameters():
                if parameter.ndim == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
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


def _train_model(
    recipe: Recipe,
    network: nn.Module,
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    codes: list[Shards],
    prompts: list[str],
    out: Path,
    resume: bool,
    fsdp: bool,
) -> TextToImage:
    settings, family = recipe.model, recipe.model.family
    seed = settings.training.seed
    train_codes, val_codes = (_Codes(own.folder, training_data(family)) for own in codes)
    held_out = default_collate(val_codes.__getitems__(range(min(512, len(val_codes)))))
    set_seed(seed)
    wrapped = ConditionDropout(network, text.null_condition, settings.condition_dropout)
    loss = training_loss(settings, network)

    def training_step(module: nn.Module, batch: Any, step: int, part: Part) -> Tensor:
        # functions of seed and step alone, so that a resumed run draws what the uninterrupted one would have
        wrapped.reseed(step_seed(seed, step), part)
        return loss(module, batch[0], batch[1], step_generator(seed, step), part)

    def report(average: nn.Module, step: int) -> dict[str, float]:
        assert isinstance(average, ConditionDropout)
        values = validation_losses(average, loss, *held_out)
        pipe = TextToImage(text, average, tokenizer.to(_device(average)), family)
        save_picture(_samples(pipe, prompts), out / "pictures" / f"{family}-{step:06d}.png")
        return values

    trained = fit(
        wrapped,
        train_codes,
        training_step,
        settings.training,
        out / "logs" / family,
        resume=resume,
        report=report,
        shard=fsdp,
    )
    assert isinstance(trained, ConditionDropout)
    pipe = TextToImage(text, trained.cpu(), tokenizer.cpu(), family)
    if join_processes().is_main_process:
        pipe.save_pretrained(out)
    join_processes().wait_for_everyone()
    return pipe


def _device(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


@torch.no_grad()
def validation_losses(
    wrapped: ConditionDropout, loss: Loss, data: Tensor, cond: Tensor
) -> dict[str, float]:
    """Loss with and without the condition; their difference is what guidance has to work with."""
    device = _device(wrapped)
    data, cond = data.to(device), cond.to(device)
    null = wrapped.null_condition
    assert isinstance(null, Tensor)
    values = {}
    for name, condition in (("", cond), ("_uncond", null.expand_as(cond))):
        generator = torch.Generator().manual_seed(0)  # the same noise for both
        value = loss(wrapped.model, data, condition, generator, WHOLE)
        values[f"validation_loss{name}"] = float(value)
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
