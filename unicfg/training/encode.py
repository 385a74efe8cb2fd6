"""Pre-encoding: images become tokens and latents once, in shards on disk, and models are trained on these."""

from __future__ import annotations

import hashlib
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from models.labels import PromptEncoder
from tokenizers_vq import VQTokenizer, to_float
from unicfg.processes import join_processes
from unicfg.training.families import step_seed
from unicfg.training.shards import INDEX, Shards, finish_shards, is_written, write_shard
from unicfg.training.sources import read_captions

BATCH, MOST_PIXELS = 64, 1 << 22  # encoded at once: so many images, or fewer where they are large


def hash_of(tokenizer: VQTokenizer) -> str:
    """A hash of a tokenizer's configuration and weights: what its codes mean."""
    digest = hashlib.sha256(json.dumps(asdict(tokenizer.config)).encode())
    for name, tensor in tokenizer.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_images(
    tokenizer: VQTokenizer,
    text: PromptEncoder,
    images: Path,
    part: str,
    folder: Path,
    *,
    crops: int = 1,
    shift: int = 0,
    seed: int = 0,
) -> Shards:
    """Encode the images of ``prepare_images``; shards that an interrupted run has finished are not done again.

    All processes take part. The codes of an image do not depend on how many there are.

    Args:
        tokenizer: on the device that is to do it.
        text: of the captions.
        images: the folder with the shards of pixels.
        part: "train" or "validation".
        folder: of the codes: ``ids`` int32 (N, L), ``latents`` (N, C, h, w) and ``text`` int32 (N, T).
        crops: encodings of each image, all images once before any comes again; the first is of the image as it is.
        shift: pixels, at most, by which it is moved for the others.
        seed: of the shifts; without further crops, codes of one seed are those of any.

    Returns:
        the codes, with the keys "ids", "latents" and "text".

    Raises:
        ValueError: if the folder holds codes of another tokenizer, other images or other captions, or of other crops.
        OSError: if something cannot be written; finished shards stay.
    """
    keys = ("ids", "latents", "text")
    pixels = Shards(images / part, ("images",))
    settings = f"crops {crops}"
    if crops > 1 and shift > 0:
        settings += f", shift {shift} and seed {seed}"
    else:
        shift = seed = 0  # as nothing is shifted, they make no other codes
    parts = [pixels.made_from, hash_of(tokenizer), _hash_of_text(text), crops, shift, seed]
    made_from = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    if (folder / INDEX).exists():
        return Shards(folder, keys, made_from, settings)
    processes = join_processes()
    total = crops * pixels.count
    with tqdm(
        total=crops * len(pixels),
        desc=f"encoding {part} images",
        unit="image",
        disable=not processes.is_main_process,
    ) as bar:
        for crop in range(crops):
            for shard, captions in enumerate(read_captions(images, part)):
                number = crop * pixels.count + shard
                mine = number % processes.num_processes == processes.process_index
                if mine and not is_written(folder, number, made_from, settings):
                    (some,) = pixels.read(shard)
                    generator = torch.Generator().manual_seed(step_seed(seed, number))
                    codes = encode_batches(tokenizer, some, shift if crop else 0, generator)
                    codes["text"] = text.encode(captions).to(torch.int32)
                    write_shard(folder, number, codes, made_from)
                bar.update(len(captions))
    processes.wait_for_everyone()
    if processes.is_main_process:
        finish_shards(folder, total, made_from)
    processes.wait_for_everyone()
    return Shards(folder, keys, made_from, settings)


def _hash_of_text(text: PromptEncoder) -> str:
    """A hash of all that says what captions become."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "text.json"
        text.save(file)
        return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def encode_batches(
    tokenizer: VQTokenizer, images: Tensor, shift: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """Ids (N, L) and latents (N, C, h, w) of uint8 images (N, 3, H, W), each shifted at random."""
    device, config = tokenizer.latent_mean.device, tokenizer.config
    side = config.image_size // config.factor
    ids = [torch.empty(0, side * side, dtype=torch.int32)]  # a shard may have no rows
    latents = [torch.empty(0, tokenizer.latent_channels, side, side)]
    batch_size = max(1, min(BATCH, MOST_PIXELS // config.image_size**2))
    for batch in images.split(batch_size) if len(images) else ():
        shown = shifted(to_float(batch), shift, generator).to(device)
        ids.append(tokenizer.encode(shown).flatten(1).to(torch.int32).cpu())
        latents.append(tokenizer.encode_latents(shown).cpu())
    return {"ids": torch.cat(ids), "latents": torch.cat(latents)}


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
