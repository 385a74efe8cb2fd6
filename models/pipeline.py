"""``TextToImage``: prompts in, images out; the same call for every family."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor

from models.labels import PromptEncoder, load_prompt_encoder
from models.token_transformer import TokenTransformer
from tokenizers_vq import VQTokenizer
from tokenizers_vq.hub import (
    FORMAT_VERSION,
    WEIGHTS,
    check_format_version,
    load_tensors,
    read_json,
    save_part,
    write_atomically,
    write_text_atomically,
)
from tokenizers_vq.images import to_images
from unicfg.guidance import Guidance
from unicfg.sampling import TokenStep, sample_autoregressive
from unicfg.training.dropout import ConditionDropout

MODEL_CLASSES: dict[str, type[TokenTransformer]] = {"ar": TokenTransformer}
DESCRIPTION = "pipeline.json"
NULL_FILE, NULL_KEY = "null_condition.safetensors", "null_condition"


class TextToImage:
    """A prompt encoder, a guided model and an image tokenizer.

    On disk it is a folder with ``pipeline.json``, ``text.json``, ``tokenizer/`` and one folder a family, each a
    configuration and a safetensors file.

    Args:
        text: prompts to condition ids: a text tokenizer, or class labels.
        model: the trained model in its ``ConditionDropout``, which holds the null condition.
        tokenizer: tokens to images.
        family: how the model generates.

    Raises:
        ValueError: if the family is unknown, or the parts do not fit together.
    """

    def __init__(
        self,
        text: PromptEncoder,
        model: ConditionDropout,
        tokenizer: VQTokenizer,
        family: str = "ar",
    ) -> None:
        if family not in MODEL_CLASSES:
            raise ValueError(f"family is {family!r}, expected one of {sorted(MODEL_CLASSES)}")
        network = model.model
        if not isinstance(network, MODEL_CLASSES[family]):
            raise ValueError(
                f"model is a {type(network).__name__}, the family {family!r} expects a "
                f"{MODEL_CLASSES[family].__name__}"
            )
        if network.config.codebook_size != tokenizer.codebook_size:
            raise ValueError(
                f"the model has {network.config.codebook_size} tokens and the tokenizer "
                f"{tokenizer.codebook_size}: they were not trained together"
            )
        if network.config.condition_length != text.length:
            raise ValueError(
                f"the model takes {network.config.condition_length} text tokens and the text "
                f"tokenizer gives {text.length}: they were not trained together"
            )
        if network.config.condition_vocabulary != text.vocabulary:
            raise ValueError(
                f"the model knows {network.config.condition_vocabulary} text tokens and the text "
                f"tokenizer {text.vocabulary}: they were not trained together"
            )
        null = model.null_condition
        if not isinstance(null, Tensor) or null.shape != (text.length,):
            shape = tuple(null.shape) if isinstance(null, Tensor) else type(null).__name__
            raise ValueError(f"the null condition is {shape}, expected ids ({text.length},)")
        self.text, self.tokenizer, self.family = text, tokenizer.eval(), family
        self.model = model.eval()

    @property
    def network(self) -> TokenTransformer:
        """The bare model, without its dropout wrapper."""
        network = self.model.model
        assert isinstance(network, TokenTransformer)
        return network

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tokenizer.latent_mean.device

    def to(self, device: torch.device | str) -> TextToImage:
        """Move model and tokenizer; returns itself."""
        self.model.to(device)
        self.tokenizer.to(device)
        return self

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> condition ids (B, T) on the model's device."""
        return self.text.encode(prompts).to(self.device)

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        callback: Callable[[TokenStep], None] | None = None,
    ) -> Tensor:
        """Like calling the pipeline, same arguments, but returns images (B, 3, H, W) in [-1, 1]."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}, expected a list with at least one string")
        ids = sample_autoregressive(
            self.model,
            self.encode_prompts(prompts),
            seeds=seeds,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            callback=callback,
        )
        side = self.network.config.grid
        return self.tokenizer.decode(ids.view(-1, side, side))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: Guidance | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        callback: Callable[[TokenStep], None] | None = None,
    ) -> list[Image.Image]:
        """Draw one image a prompt.

        Args:
            prompts: B texts; one that is too long is cut, with a warning.
            seeds: B ints; the same seed gives the same image in a batch of any size.
            guidance: scale and schedule; None is ``Guidance(1.0)``.
            temperature: divides the guided logits; 0 takes the most likely token.
            top_k: keep the k most likely tokens, after guidance.
            top_p: keep the most likely tokens up to this probability, after guidance.
            callback: called after each token, see :class:`unicfg.sampling.TokenStep`.

        Returns:
            B images.

        Raises:
            ValueError: if prompts and seeds differ in number, or an option is out of range.
            FloatingPointError: if the model's outputs leave no token to draw.

        Example:
            >>> pipe = TextToImage.from_pretrained("shapes")
            >>> images = pipe(["a red circle"], guidance=Guidance(3.0), seeds=[0])
        """
        images = self.sample(
            prompts,
            seeds=seeds,
            guidance=guidance,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            callback=callback,
        )
        return to_images(images)

    def save_pretrained(self, folder: Path | str, *, dtype: torch.dtype | None = None) -> Path:
        """Write the pipeline; other families that are already in the folder stay.

        Args:
            folder: made if need be.
            dtype: of the weights on disk, ``torch.float16`` for half the size; None keeps them as they are.

        Raises:
            OSError: if it cannot be written.
        """
        folder = Path(folder)
        null = self.model.null_condition
        assert isinstance(null, Tensor)
        save_part(self.tokenizer, folder / "tokenizer", dtype)
        self.text.save(folder / "text.json")
        null_file = folder / self.family / NULL_FILE
        write_atomically({NULL_KEY: null.detach().cpu()}, null_file, {})
        save_part(self.network, folder / self.family, dtype)
        families = sorted(f for f in MODEL_CLASSES if (folder / f / WEIGHTS).exists())
        description = {"format_version": FORMAT_VERSION, "families": families}
        # last, so that what it names is there
        write_text_atomically(json.dumps(description, indent=2) + "\n", folder / DESCRIPTION)
        return folder

    @classmethod
    def from_pretrained(cls, name: Path | str, family: str | None = None) -> TextToImage:
        """Load a pipeline.

        Args:
            name: of weights that ship with the library (``"emoji"``, ``"shapes"``), a folder, or a repository
                on the Hugging Face hub.
            family: ``"ar"`` by default.

        Raises:
            FileNotFoundError: if there is no such pipeline; says where it was looked for.
            ValueError: if the folder does not hold the family, or a file does not fit.
        """
        family = family or "ar"
        folder = find_weights(name)
        description = read_json(folder / DESCRIPTION)
        check_format_version(description.get("format_version"))
        families = description.get("families")
        if not isinstance(families, list) or family not in families or family not in MODEL_CLASSES:
            raise ValueError(f"{name} holds the families {families}, not {family!r}")
        network = MODEL_CLASSES[family].from_pretrained(folder / family)
        null = load_tensors(folder / family / NULL_FILE)
        if null.keys() != {NULL_KEY}:
            raise ValueError(
                f"{folder / family / NULL_FILE} holds {sorted(null)}, expected [{NULL_KEY!r}]"
            )
        return cls(
            load_prompt_encoder(folder / "text.json"),
            ConditionDropout(network, null[NULL_KEY]),
            VQTokenizer.from_pretrained(folder / "tokenizer"),
            family,
        )


def shipped_weights() -> dict[str, Path]:
    """Names and folders of the weights that ship with the library."""
    root = Path(str(resources.files("models"))) / "weights"
    return {p.parent.name: p.parent for p in sorted(root.glob(f"*/{DESCRIPTION}"))}


def find_weights(name: Path | str) -> Path:
    """The folder of a pipeline: shipped, local, or downloaded from the hub, in that order.

    Raises:
        FileNotFoundError: if it is none of these.
    """
    shipped = shipped_weights()
    if str(name) in shipped:
        return shipped[str(name)]
    if (Path(name) / DESCRIPTION).is_file():
        return Path(name)
    known = f"expected one of {sorted(shipped)}, a folder with pipeline.json, or a hub repository"
    if Path(name).exists() or str(name).count("/") != 1:
        raise FileNotFoundError(f"no pipeline at {str(name)!r}: {known}")
    try:
        return Path(snapshot_download(str(name)))
    except Exception as error:  # the hub client has no common base class for "not to be had"
        raise FileNotFoundError(f"no pipeline at {str(name)!r} ({error}): {known}") from error
