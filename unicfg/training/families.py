"""What is a family's own in training: its network, its data and its loss. A new family goes here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from models import (
    HybridTransformer,
    HybridTransformerConfig,
    LatentDenoiser,
    LatentDenoiserConfig,
    MaskedTransformer,
    TokenTransformer,
    TokenTransformerConfig,
)
from models.labels import PromptEncoder
from tokenizers_vq import VQTokenizerConfig
from unicfg.training.dropout import Part
from unicfg.training.losses import (
    Noising,
    denoising_loss,
    hybrid_loss,
    masked_loss,
    token_loss,
)
from unicfg.training.recipe import Family, HeadRecipe, ModelRecipe, NoiseRecipe

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator, Part], Tensor]
"""(model, data, cond, generator, part of the batch) -> scalar."""


def make_network(
    recipe: ModelRecipe, tokenizer: VQTokenizerConfig, text: PromptEncoder
) -> nn.Module:
    """The untrained network of a recipe.

    Raises:
        ValueError: if the settings do not go together.
    """
    for name, usual, users in (
        ("patch", 1, ("diffusion", "flow")),
        ("noise", NoiseRecipe(), ("diffusion", "flow", "hybrid")),
        ("head", HeadRecipe(), ("hybrid",)),
    ):
        value = getattr(recipe, name)
        if value != usual and recipe.family not in users:
            raise ValueError(
                f"{name} is {value}, expected it to be left alone for the family {recipe.family}: "
                f"it is for {', '.join(users)}"
            )
    grid, channels = tokenizer.image_size // tokenizer.factor, tokenizer.latent_channels
    # positional, in the order of models.body.BodyConfig
    body = (grid, text.vocabulary, text.length, recipe.width, recipe.depth, recipe.heads)
    if recipe.family in ("ar", "masked"):
        config = TokenTransformerConfig(
            *body, dropout=recipe.dropout, codebook_size=tokenizer.num_codes
        )
        return TokenTransformer(config) if recipe.family == "ar" else MaskedTransformer(config)
    path, space = _path_and_space(recipe)
    if recipe.family == "hybrid":
        return HybridTransformer(
            HybridTransformerConfig(
                *body,
                dropout=recipe.dropout,
                latent_channels=channels,
                order=recipe.head.order,
                head_width=recipe.head.width,
                head_depth=recipe.head.depth,
                path=path,
                space=space,
            )
        )
    return LatentDenoiser(
        LatentDenoiserConfig(
            *body,
            dropout=recipe.dropout,
            latent_channels=channels,
            patch=recipe.patch,
            path=path,
            space=space,
        )
    )


def _path_and_space(recipe: ModelRecipe) -> tuple[str, str]:
    """What the recipe says, or what is usual for the family."""
    usual = {
        "diffusion": ("cosine", "v"),
        "flow": ("straight", "flow"),
        "hybrid": ("straight", "flow"),
    }[recipe.family]
    path, space = recipe.noise.path or usual[0], recipe.noise.space or usual[1]
    if recipe.family == "flow" and (path, space) != usual:
        raise ValueError(
            f"noise is path {path!r} and space {space!r}, expected 'straight' and 'flow' "
            "for the family flow; the family diffusion takes the others"
        )
    return path, space


def training_data(family: Family) -> Literal["ids", "latents"]:
    """Which of an image's encodings the family is trained on."""
    return "ids" if family in ("ar", "masked") else "latents"


def training_loss(recipe: ModelRecipe, network: nn.Module) -> Loss:
    """The loss of a network that :func:`make_network` made from the same recipe."""
    if isinstance(network, TokenTransformer):
        return lambda model, ids, cond, generator, part: token_loss(model, ids, cond)
    if isinstance(network, MaskedTransformer):
        mask_token = network.mask_token
        return lambda model, ids, cond, generator, part: masked_loss(
            model, ids, cond, mask_token, generator, part
        )
    if isinstance(network, LatentDenoiser):
        noising = _noising(recipe, network)
        return lambda model, latents, cond, generator, part: denoising_loss(
            model, latents, cond, noising, generator, part
        )
    assert isinstance(network, HybridTransformer)
    noising = _noising(recipe, network.head)
    masked = network.order == "masked"
    return lambda model, latents, cond, generator, part: hybrid_loss(
        model,
        latents.flatten(2).transpose(1, 2),
        cond,
        noising,
        recipe.head.draws,
        masked,
        generator,
        recipe.head.context_noise,
        part,
    )


def _noising(recipe: ModelRecipe, denoiser: LatentDenoiser | nn.Module) -> Noising:
    usual: Literal["uniform", "logit-normal"] = (
        "logit-normal" if recipe.family == "flow" else "uniform"
    )
    noise = recipe.noise
    return Noising(
        denoiser.path,  # type: ignore[arg-type]
        denoiser.space,  # type: ignore[arg-type]
        noise.time or usual,
        noise.shift,
        noise.min_snr,
    )


def step_seed(seed: int, step: int) -> int:
    """The seed of one training step: a function of these two alone, so that a resumed run draws the same."""
    return seed * 1_000_003 + step


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one training step."""
    return torch.Generator().manual_seed(step_seed(seed, step))
