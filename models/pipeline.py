"""``TextToImage``: prompts in, images out; the same call for every family."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias, TypedDict, Unpack

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from models.batches import Jobs, OutOfMemory, free_memory
from models.compiled import is_out_of_memory
from models.denoiser import LatentDenoiser
from models.folders import describe, families_beside, find_weights, listed_families
from models.hybrid import HybridTransformer
from models.labels import PromptEncoder, load_prompt_encoder
from models.quantized import is_quantized, quantize
from models.token_transformer import MaskedTransformer, TokenTransformer
from tokenizers_vq import Facts, VQTokenizer
from tokenizers_vq.cards import upload, write_card
from tokenizers_vq.files import load_tensors, write_atomically
from tokenizers_vq.hub import WEIGHTS, save_part
from tokenizers_vq.images import from_image, to_images
from unicfg.guidance import Guidance
from unicfg.sampling import (
    Branch,
    DenoisingStep,
    LatentStep,
    Step,
    sample_autoregressive,
    sample_diffusion,
    sample_hybrid,
    sample_masked,
)
from unicfg.sampling.hybrid import PASSES
from unicfg.sampling.randomness import check_seeds
from unicfg.sampling.soundness import LATENTS, places_of, unsound
from unicfg.training.dropout import ConditionDropout

Network = TokenTransformer | MaskedTransformer | LatentDenoiser | HybridTransformer
MODEL_CLASSES: dict[str, type[Network]] = {
    "ar": TokenTransformer,
    "masked": MaskedTransformer,
    "diffusion": LatentDenoiser,
    "flow": LatentDenoiser,
    "hybrid": HybridTransformer,
}
# what each family can be told beyond seeds, guidance and callback
OPTIONS: dict[str, tuple[str, ...]] = {
    "ar": ("temperature", "top_k", "top_p", "compile"),
    "masked": (
        *("steps", "reveal", "choice_noise", "temperature", "top_k", "top_p"),
        *("refresh", "init_image", "mask"),
    ),
    "diffusion": ("steps", "solver", "scheduler", "refresh", "init_image", "mask"),
    "flow": ("steps", "solver", "scheduler", "refresh", "init_image", "mask"),
    "hybrid": ("steps", "solver", "temperature", "guide_at", "compile", "head_callback"),
}


class Options(TypedDict, total=False):
    """What a call can say beyond prompts, seeds, guidance, branches and callback; see :meth:`TextToImage.__call__`."""

    steps: int | None
    solver: str | None
    scheduler: Any
    reveal: str | None
    choice_noise: float | None
    temperature: float
    top_k: int | None
    top_p: float | None
    guide_at: str | None
    refresh: int
    compile: bool
    head_callback: Callable[[DenoisingStep], None] | None
    init_image: Image.Image | Tensor | None
    mask: Image.Image | Tensor | None


# what says nothing, besides None: any family can be told so
SILENT: dict[str, Any] = {"temperature": 1.0, "refresh": 1, "compile": False}
# unless told otherwise
STEPS = {"masked": 16, "diffusion": 30, "flow": 30, "hybrid": 20}
# an order by confidence draws more of the prompt by itself, which hides what guidance adds
REVEAL = "halton"
# images a batch; beyond this nothing is gained
MOST_AT_ONCE = 64
SOLVERS = {"diffusion": "dpmpp_2m", "flow": "dpmpp_2m", "hybrid": "ddim"}
SAMPLERS: dict[str, Callable[..., Tensor]] = {
    "ar": sample_autoregressive,
    "masked": sample_masked,
    "diffusion": sample_diffusion,
    "flow": sample_diffusion,
    "hybrid": sample_hybrid,
}
NULL_FILE, NULL_KEY = "null_condition.safetensors", "null_condition"


BranchLike: TypeAlias = "str | Sequence[str] | Branch | TextToImage"
"""What a branch may be given as: also a :class:`TextToImage`."""


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
            raise ValueError(f"family is {family!r}, expected one of {', '.join(MODEL_CLASSES)}")
        network = model.model
        if not isinstance(network, MODEL_CLASSES[family]):
            raise ValueError(
                f"model is a {type(network).__name__}, the family {family!r} expects a "
                f"{MODEL_CLASSES[family].__name__}"
            )
        if family == "flow" and network.space != "flow":
            raise ValueError(
                f"model predicts {network.space}, the family 'flow' expects 'flow': the others are 'diffusion'"
            )
        _check_encoding(network, tokenizer)
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
    def network(self) -> Network:
        """The bare model, without its dropout wrapper."""
        network = self.model.model
        assert isinstance(network, Network)
        return network

    @property
    def space(self) -> str:
        """What guidance combines: "logits", or the space that the denoiser or the hybrid's head predicts in."""
        network = self.network
        if isinstance(network, HybridTransformer):
            return network.head.space
        return network.space if isinstance(network, LatentDenoiser) else "logits"

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.tokenizer.latent_mean.device

    def to(self, device: torch.device | str) -> TextToImage:
        """Move model and tokenizer; returns itself. For half precision: ``pipe.model.to(dtype)``, the tokenizer stays."""
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
        branches: Mapping[str, BranchLike] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        callback: Callable[[Any], None] | None = None,
        **options: Unpack[Options],
    ) -> Tensor:
        """Like calling the pipeline, same arguments, but returns images (B, 3, H, W) in [-1, 1]."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}, expected a list with at least one string")
        seeds = check_seeds(seeds, len(prompts))
        given = self.check_options(**options)
        jobs = Jobs(prompts, seeds, guidance, branches, given.get("init_image"))
        jobs.check()
        size = self._batch_size(batch_size, jobs)
        finished: list[Tensor] = []
        start = 0
        with tqdm(total=len(prompts), desc="drawing", unit="image", disable=not progress) as bar:
            while start < len(prompts):
                part = jobs.part(start, min(start + size, len(prompts)))
                count = len(part.prompts)
                try:
                    finished.append(self._draw(part, given, callback))
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    if not is_out_of_memory(error):
                        raise
                    if count == 1 or not jobs.can_be_split():
                        raise OutOfMemory(count, finished) from error
                    size = -(-count // 2)
                    warnings.warn(
                        f"{count} images at once do not fit into memory: going on with batch_size={size}",
                        stacklevel=2,
                    )
                    continue
                start += count
                bar.update(count)
        return torch.cat(finished)

    def quantize(self) -> TextToImage:
        """The same pipeline with its network's weights as int8, for sampling on devices where reading them takes the time.

        What it changes in the distribution of tokens is in ``benchmarks/results/int8.md``.

        Raises:
            ImportError: if torchao is not installed: it comes with the extra ``int8``.
        """
        null = self.model.null_condition
        assert isinstance(null, Tensor)
        wrapped = ConditionDropout(quantize(self.network), null).eval().to(self.device)
        return TextToImage(self.text, wrapped, self.tokenizer, self.family)

    def memory_needed(self, images: int, *, branches: int = 2) -> int:
        """About how many bytes a batch takes besides the weights: caches, hidden states, logits and pixels.

        The keys and values of a cached family are exact; the rest is counted from the sizes of the largest tensors that
        can be alive together, as if all rows went through a block at once, which on a CPU they do not: with the shipped
        shapes weights, 1.2 to 3.5 times the measured peak at 64 and 256 images.

        Args:
            images: of one batch.
            branches: rows of each image in a pass; 2 with guidance.

        Raises:
            ValueError: if one is less than 1.
        """
        for name, value in (("images", images), ("branches", branches)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected at least 1")
        config, rows = self.network.config, images * branches
        itemsize = next(self.network.parameters()).element_size()
        tokens = config.grid**2 // getattr(config, "patch", 1) ** 2
        held = 2 * config.depth * config.width * (config.condition_length + tokens)  # keys, values
        if self.family in ("ar", "hybrid"):
            a_row = held + 16 * config.width
        else:
            # of the prefix only; hidden states, projections and feed-forward of one layer at a time
            held = 2 * config.depth * config.width * config.condition_length
            a_row = 3 * held + 14 * config.width * (tokens + config.condition_length)
        vocabulary = getattr(config, "codebook_size", 0)
        scored = tokens if self.family == "masked" else 1
        # logits of each row, guided ones, and probabilities with their sums in float64
        logits = rows * scored * vocabulary * itemsize + images * scored * vocabulary * (
            itemsize + 24
        )
        size, own = self.tokenizer.config.image_size, self.tokenizer.config
        pixels = images * size**2 * own.width * 4 * 4
        weights = sum(p.nbytes for p in self.network.parameters())  # copied into a faster layout
        return weights + rows * a_row * itemsize + max(logits, pixels)

    def _batch_size(self, wanted: int | None, jobs: Jobs) -> int:
        """How many images to draw at once."""
        if wanted is not None:
            if isinstance(wanted, bool) or not isinstance(wanted, int) or wanted < 1:
                raise ValueError(f"batch_size is {wanted!r}, expected an int >= 1, or None")
            if wanted < len(jobs.prompts) and not jobs.can_be_split():
                raise ValueError(
                    f"batch_size is {wanted} for {len(jobs.prompts)} prompts, and guidance or branches hold a tensor with "
                    "an entry for each: expected None, or a call for each batch"
                )
            return wanted
        if not jobs.can_be_split():
            return len(jobs.prompts)
        count = 2 if jobs.guidance is None else len(jobs.guidance.branch_names)
        one, two = (self.memory_needed(images, branches=count) for images in (1, 2))
        each = two - one
        fitting = (free_memory(self.device) // 2 - (one - each)) // each
        return max(1, min(fitting, MOST_AT_ONCE))

    def check_options(self, **options: Unpack[Options]) -> dict[str, Any]:
        """Options of a call without those that leave all as it is; the sampler checks their values.

        Returns:
            for ``steps=8, temperature=1.0`` and the family masked, {"steps": 8}.

        Raises:
            TypeError: if there is no such option.
            ValueError: if the family does not have one.
        """
        given: dict[str, Any] = {}
        for name, value in options.items():
            if name not in Options.__annotations__:
                raise TypeError(
                    f"{name} is no option, expected some of {', '.join(Options.__annotations__)}"
                )
            if value is None or (name in SILENT and value == SILENT[name]):
                continue
            if name not in OPTIONS[self.family]:
                shown = type(value).__name__ if name in ("init_image", "mask") else repr(value)
                raise ValueError(
                    f"{name} is {shown}, which the family {self.family} does not have; "
                    f"its options are {', '.join(OPTIONS[self.family])}"
                )
            given[name] = value
        return given

    def _draw(
        self, jobs: Jobs, given: Mapping[str, Any], callback: Callable[[Any], None] | None
    ) -> Tensor:
        """Images (B, 3, H, W) of one batch."""
        prompts, branches = jobs.prompts, jobs.branches
        given = dict(given)
        given.pop("init_image", None)
        known, keep = self._known_region(jobs.init_image, given.pop("mask", None), len(prompts))
        shared: dict[str, Any] = {
            "seeds": jobs.seeds,
            "guidance": jobs.guidance,
            "callback": callback,
        }
        cond = self.encode_prompts(prompts)
        if branches is not None:
            shared["branches"] = {
                name: self._branch(name, own, prompts) for name, own in branches.items()
            }
        if self.family == "ar":
            ids = sample_autoregressive(self.model, cond, **shared, **given)
            return _finite(self.tokenizer.decode(self._as_grid(ids)))
        if self.family == "masked":
            given.setdefault("steps", STEPS["masked"])
            given.setdefault("reveal", REVEAL)
            ids = sample_masked(self.model, cond, **shared, **known, **given)
            return keep(_finite(self.tokenizer.decode(self._as_grid(ids))))
        given = {"steps": STEPS[self.family]} | given
        if "scheduler" not in given:
            given = {"solver": SOLVERS[self.family]} | given
        if self.family == "hybrid":
            tokens = sample_hybrid(self.model, cond, **shared, **given)
            latents = self._as_grid(tokens).permute(0, 3, 1, 2)
        else:
            latents = sample_diffusion(self.model, cond, **shared, **known, **given)
        return keep(_finite(self.tokenizer.decode_latents(latents)))

    def _branch(self, name: str, own: BranchLike, prompts: Sequence[str]) -> Branch:
        """What a branch runs, from a text, texts, a weaker pipeline, or as it is.

        Raises:
            ValueError: if it is something else, or a pipeline that speaks of other tokens or other text.
        """
        if isinstance(own, Branch):
            text = isinstance(own.cond, str)
            return replace(own, cond=self.encode_prompts([own.cond])[0]) if text else own
        if isinstance(own, str):
            return Branch(cond=self.encode_prompts([own])[0])
        if not isinstance(own, TextToImage):
            listed = isinstance(own, Sequence) and all(isinstance(text, str) for text in own)
            if not listed or len(own) != len(prompts):
                raise ValueError(
                    f"the branch {name!r} is {own!r}, expected a text, {len(prompts)} texts, a pipeline or a Branch"
                )
            return Branch(cond=self.encode_prompts(own))
        ours, theirs = (pipe.tokenizer.state_dict() for pipe in (self, own))
        same = ours.keys() == theirs.keys() and all(
            torch.equal(value.cpu(), theirs[key].cpu()) for key, value in ours.items()
        )
        if own.family != self.family or not same:
            what = "another tokenizer" if own.family == self.family else f"the family {own.family}"
            raise ValueError(
                f"the branch {name!r} is a pipeline with {what}, expected the tokenizer and the family "
                f"{self.family} of the pipeline that it guides"
            )
        if own.text.length != self.text.length or not torch.equal(
            own.text.encode(prompts), self.text.encode(prompts)
        ):
            raise ValueError(
                f"the branch {name!r} is a pipeline with other text tokens, expected those of the pipeline it guides"
            )
        return Branch(model=own.network)

    def digest(self) -> str:
        """A hash of all weights, to tell which ones an image was made with."""
        digest = hashlib.sha256()
        for module in (self.model, self.tokenizer):
            for name, tensor in module.state_dict().items():
                digest.update(name.encode())
                # numpy has no bfloat16
                flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
                digest.update(flat.numpy().tobytes())
        return digest.hexdigest()

    def sampler_settings(self) -> dict[str, Any]:
        """Every setting of the family's sampler where nothing is said, also those that the pipeline has no option for."""
        own = {
            name: parameter.default
            for name, parameter in inspect.signature(SAMPLERS[self.family]).parameters.items()
            if isinstance(parameter.default, (str, int, float))
        }
        return own | self.defaults()

    def defaults(self) -> dict[str, Any]:
        """What the family's options are where nothing is said, those that cost an image nothing left out."""
        values: dict[str, Any] = {"temperature": 1.0, "top_k": None, "top_p": None}
        values |= {"reveal": REVEAL, "steps": STEPS.get(self.family)}
        values |= {"solver": SOLVERS.get(self.family), "scheduler": None, "guide_at": "head"}
        options = OPTIONS[self.family]
        return {name: value for name, value in values.items() if name in options}

    def num_steps(self, steps: int | None = None) -> int:
        """How often a callback is called for one batch.

        Args:
            steps: as given to the call.
        """
        tokens = self.network.config.grid**2
        if isinstance(self.network, HybridTransformer) and self.network.order == "masked":
            return min(PASSES, tokens)
        if self.family in ("ar", "hybrid"):
            return tokens
        if self.family == "masked":
            return min(steps or STEPS["masked"], tokens)
        return STEPS[self.family] if steps is None else steps

    def preview(self, step: Step) -> Tensor:
        """The picture that a step, as a callback is given it, has so far: grey where nothing is drawn yet.

        Of a denoising step it is the clean picture that the guided output stands for.

        Args:
            step: of this pipeline's family.

        Returns:
            images (B, 3, H, W) in [-1, 1], on the CPU.
        """
        if isinstance(step, DenoisingStep):
            return self.tokenizer.decode_latents(step.x0.float()).cpu()
        if isinstance(step, LatentStep):
            latents = self._as_grid(step.latents).permute(0, 3, 1, 2)
            images, known = self.tokenizer.decode_latents(latents), self._as_grid(step.known)
        else:
            missing = self.network.config.grid**2 - step.ids.shape[1]
            unknown = self.tokenizer.codebook_size  # as the mask token is, so that both are alike
            ids = self._as_grid(F.pad(step.ids, (0, missing), value=unknown))
            known = ids < unknown
            images = self.tokenizer.decode(ids.where(known, 0))
        factor = self.tokenizer.config.factor
        drawn = known.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
        return images.where(drawn[:, None], 0.0).cpu()

    def _as_grid(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, ...) in raster order as (B, h, w, ...)."""
        side = self.network.config.grid
        return tokens.unflatten(1, (side, side))

    def _known_region(
        self, image: Image.Image | Tensor | None, mask: Image.Image | Tensor | None, batch: int
    ) -> tuple[dict[str, Any], Callable[[Tensor], Tensor]]:
        """The samplers' ``init`` and ``mask`` for an image and a mask in pixels, and what puts known pixels back."""
        if image is None and mask is None:
            return {}, lambda images: images
        if image is None or mask is None:
            missing = "init_image" if image is None else "mask"
            raise ValueError(f"{missing} is None, expected both init_image and mask, or neither")
        size, factor = self.tokenizer.config.image_size, self.tokenizer.config.factor
        pixels = from_image(image) if isinstance(image, Image.Image) else image
        pixels = pixels if pixels.ndim == 4 else pixels[None]
        if pixels.shape[1:] != (3, size, size) or len(pixels) not in (1, batch):
            raise ValueError(
                f"init_image has shape {tuple(pixels.shape)}, expected (3, {size}, {size}), "
                f"or ({batch}, 3, {size}, {size})"
            )
        if isinstance(mask, Image.Image):
            mask = torch.from_numpy(np.array(mask.convert("L"))) >= 128
        if mask.dtype != torch.bool or mask.shape != (size, size):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}, "
                f"expected bool ({size}, {size}), True where to draw anew"
            )
        # a token is drawn anew if any of its pixels is to be
        cells = F.max_pool2d(mask[None, None].float(), factor)[0, 0].bool().to(self.device)
        if (
            not pixels.is_floating_point()
            or not bool(pixels.isfinite().all())
            or pixels.abs().max() > 1
        ):
            raise ValueError(
                f"init_image is {pixels.dtype} from {float(pixels.min()):g} to {float(pixels.max()):g}, "
                "expected finite floats in [-1, 1]"
            )
        pixels = pixels.to(self.device)
        encode = self.tokenizer.encode if self.family == "masked" else self.tokenizer.encode_latents
        init = encode(pixels)
        region = {"init": init.expand(batch, *init.shape[1:]), "mask": cells}
        anew = cells.repeat_interleave(factor, 0).repeat_interleave(factor, 1)

        def keep(images: Tensor) -> Tensor:
            # the tokenizer would change the known pixels a little
            return torch.where(anew, images, pixels)

        return region, keep

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        guidance: Guidance | None = None,
        branches: Mapping[str, BranchLike] | None = None,
        batch_size: int | None = None,
        progress: bool = False,
        callback: Callable[[Any], None] | None = None,
        **options: Unpack[Options],
    ) -> list[Image.Image]:
        """Draw one image a prompt.

        An option that the family does not have is refused, not ignored; ``OPTIONS`` lists them.

        Args:
            prompts: B texts; one that is too long is cut, with a warning.
            seeds: B ints; the same seed gives the same image in a batch of any size.
            guidance: scale and schedule; None is ``Guidance(1.0)``.
            batch_size: images to draw at once; None is what fits into half of the free memory, at most
                ``MOST_AT_ONCE``. A batch that turns out too large is drawn again in halves, with a warning, and what is
                finished is kept; the callback then sees its steps again.
            progress: show a progress bar of the images.
            options: of the family, as follows; see :class:`Options` for their types.
            branches: what runs in the branches that guidance names beside "cond" and "uncond": a text for all prompts,
                or one each; another pipeline of the same family, tokenizer and text, as the weak model; or a ``Branch``.
            steps: masked: passes over the tokens; diffusion and flow: denoising steps; hybrid: steps of the head for
                each token. None is ``STEPS`` of the family.
            solver: diffusion, flow, hybrid: "ddim", "heun", "dpmpp_2m" or "cfg_pp".
            scheduler: diffusion, flow: a scheduler of diffusers in place of a solver.
            reveal: masked: "cosine", "linear", "arccos" or "halton". The last, a fixed order, is the default here: the others
                keep the most confident tokens, which draws more of the prompt by itself and leaves less to guidance.
            choice_noise: masked, but for "halton": on the confidence; see :func:`unicfg.sampling.sample_masked`.
            temperature: ar, masked: divides the guided logits, 0 takes the most likely token; hybrid: multiplies
                the noise that the head starts from.
            top_k: ar, masked: keep the k most likely tokens, after guidance.
            top_p: ar, masked: keep the most likely tokens up to this probability, after guidance.
            guide_at: hybrid: "head", "states" or "both"; see :func:`unicfg.sampling.sample_hybrid`.
            refresh: masked, diffusion, flow: run the other branches than the condition every ``refresh`` steps; see
                :func:`unicfg.sampling.sample_diffusion`.
            compile: ar, hybrid: decode with a compiled step; see :func:`unicfg.sampling.sample_autoregressive`.
            head_callback: hybrid: called with each step of the head; see :func:`unicfg.sampling.sample_hybrid`.
            init_image: masked, diffusion, flow: an image (3, H, W) in [-1, 1], or one a prompt (B, 3, H, W), of which
                a part is drawn anew.
            mask: which part, bool (H, W), or a picture that is white there. A token is drawn anew if any of its pixels is
                to be; all other pixels come back as they are.
            callback: called after each step with that family's step object.

        Returns:
            B images.

        Raises:
            ValueError: if prompts and seeds differ in number, or an option is out of range or not the family's.
            TypeError: if there is no such option.
            OutOfMemory: if one image does not fit into memory; it holds the images that are finished.
            FloatingPointError: if the model's outputs or what is made of them are not finite, or leave no token to draw;
                names the step, the samples of the batch, and what to do.

        Example:
            >>> pipe = TextToImage.from_pretrained("shapes")
            >>> images = pipe(["a red circle"], guidance=Guidance(3.0), seeds=[0])
            >>> away = Guidance(branches.negative(3.0, 1.5))
            >>> images = pipe(["a circle"], guidance=away, branches={"negative": "something red"}, seeds=[0])
        """
        images = self.sample(
            prompts,
            seeds=seeds,
            guidance=guidance,
            branches=branches,
            batch_size=batch_size,
            progress=progress,
            callback=callback,
            **options,
        )
        return to_images(images)

    def save_pretrained(
        self, folder: Path | str, *, dtype: torch.dtype | None = None, facts: Facts | None = None
    ) -> Path:
        """Write the pipeline; other families that are already in the folder stay.

        Args:
            folder: made if need be.
            dtype: of the weights on disk, ``torch.float16`` for half the size, ``torch.int8`` for a quarter (matrices as
                integers with a scale for each row); None keeps them as they are. They are floats again when they are read.
            facts: for a card, ``README.md``; None writes none and leaves alone what is there.

        Raises:
            OSError: if it cannot be written.
            ValueError: if the weights are quantized: keep the pipeline that they were made from. If they do not fit into
                ``dtype``, or it is another.
        """
        if is_quantized(self.network):
            raise ValueError(
                "the network was quantized, which is not saved: expected the pipeline that quantize() was called on; "
                "dtype=torch.int8 stores that one in 8 bits"
            )
        folder = Path(folder)
        null = self.model.null_condition
        assert isinstance(null, Tensor)
        save_part(self.tokenizer, folder / "tokenizer", dtype)
        self.text.save(folder / "text.json")
        null_file = folder / self.family / NULL_FILE
        write_atomically({NULL_KEY: null.detach().cpu()}, null_file, {})
        save_part(self.network, folder / self.family, dtype)
        families = [f for f in MODEL_CLASSES if (folder / f / WEIGHTS).exists()]
        if facts is not None:
            self._write_card(folder, str(folder), families, facts)
        describe(folder, families)  # last, so that what it names is there
        return folder

    def _write_card(self, folder: Path, name: str, families: Sequence[str], facts: Facts) -> None:
        code = (
            "from models import TextToImage\nfrom unicfg import Guidance\n\n"
            f"pipe = TextToImage.from_pretrained({name!r}, family={self.family!r})\n"
            f'images = pipe(["..."], guidance=Guidance(3.0), seeds=[0])'
        )
        about = f"Text to images by guided token models of unicfg: {', '.join(families)}."
        title = Path(name).resolve().name if Path(name).is_dir() else name
        write_card(folder, title, about, code, facts, families, "text-to-image")

    def push_to_hub(
        self,
        repo_id: str,
        facts: Facts,
        *,
        prompts: Sequence[str] = (),
        guidance: Guidance | None = None,
        dtype: torch.dtype | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload weights and card",
    ) -> str:
        """Send the pipeline and a card to a repository of the Hugging Face hub.

        Other families that it holds stay, if they have the same image tokenizer and prompt encoder; its card is replaced.

        Args:
            repo_id: as in "someone/shapes"; made if need be. ``from_pretrained(repo_id)`` reads it again.
            facts: for the card.
            prompts: of the card's picture, a row of seeds 0 to 7 each; none takes ``facts.picture``.
            guidance: of these pictures; None is ``Guidance(3.0)``.
            dtype: of the weights on disk, see :meth:`save_pretrained`.
            private: of a new repository.
            token: of the hub; None takes the one that is logged in.
            commit_message: of the commit.

        Returns:
            the address of the commit.

        Raises:
            ValueError: if the repository holds families of another tokenizer, or there is no owner in ``repo_id``.
        """
        guidance = Guidance(3.0) if guidance is None else guidance
        if prompts:
            rows = "; ".join(f"“{prompt}”" for prompt in prompts)
            caption = (
                f"Rows: {rows}. Family {self.family}, {guidance}, seeds 0 to 7, nothing was picked."
            )
            facts = replace(facts, picture=self._samples(prompts, guidance), caption=caption)

        def write(folder: Path) -> None:
            self.save_pretrained(folder, dtype=dtype)
            held = {*families_beside(folder, repo_id, token), self.family}
            families = [family for family in MODEL_CLASSES if family in held]
            describe(folder, families)
            self._write_card(folder, repo_id, families, facts)

        return upload(repo_id, write, private=private, token=token, commit_message=commit_message)

    def _samples(self, prompts: Sequence[str], guidance: Guidance) -> Image.Image:
        columns = 8
        every = [prompt for prompt in prompts for _ in range(columns)]
        images = self(every, guidance=guidance, seeds=[*range(columns)] * len(prompts))
        width, height = images[0].size
        grid = Image.new("RGB", (columns * width, len(prompts) * height))
        for i, image in enumerate(images):
            grid.paste(image, (i % columns * width, i // columns * height))
        return grid

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        family: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
    ) -> TextToImage:
        """Load a pipeline.

        Args:
            name: of weights that ship with the library (``"emoji"``, ``"shapes"``), a folder, or a repository
                on the Hugging Face hub.
            family: ``"ar"`` by default.
            revision: branch, tag or commit of a repository.
            token: of the hub; None takes the one that is logged in.

        Raises:
            FileNotFoundError: if there is no such pipeline; says where it was looked for.
            ValueError: if the folder does not hold the family, or a file does not fit.
        """
        family = family or "ar"
        if family not in MODEL_CLASSES:
            raise ValueError(f"family is {family!r}, expected one of {', '.join(MODEL_CLASSES)}")
        folder = find_weights(name, (family,), revision=revision, token=token)
        families = listed_families(folder)
        if family not in families:
            held = ", ".join(families)
            raise ValueError(f"{name} holds the families {held:.200}, not {family}")
        network = MODEL_CLASSES[family].from_pretrained(folder / family)
        null = _load_null(folder / family / NULL_FILE, network)
        return cls(
            load_prompt_encoder(folder / "text.json"),
            ConditionDropout(network, null),
            VQTokenizer.from_pretrained(folder / "tokenizer"),
            family,
        )


def _load_null(file: Path, network: Network) -> Tensor:
    """The null condition, ids (T,).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, holds something else, or ids that the network does not know.
    """
    config = network.config
    expected = torch.empty(config.condition_length, dtype=torch.long, device="meta")
    null = load_tensors(file, {NULL_KEY: expected}, "the null condition")[NULL_KEY]
    if not (int(null.min()) >= 0 and int(null.max()) < config.condition_vocabulary):
        raise ValueError(
            f"{file} holds the ids {null.tolist()[:8]}, expected ids below {config.condition_vocabulary}"
        )
    return null


def _finite(images: Tensor) -> Tensor:
    """The images (B, 3, H, W), if they are some.

    Raises:
        FloatingPointError: if a pixel is not finite; names the samples.
    """
    if LATENTS.broken(images):
        advice = (
            "the samplers found nothing wrong before, so look at the weights of the image tokenizer"
        )
        raise unsound(
            "the decoded images are not finite", places_of(LATENTS.samples(images)), advice
        )
    return images


def _check_encoding(network: Network, tokenizer: VQTokenizer) -> None:
    """Refuse a model and an image tokenizer that do not speak the same language."""
    pairs = {"tokens a side": (network.config.grid, tokenizer.grid(tokenizer.config.image_size))}
    if isinstance(network, TokenTransformer | MaskedTransformer):
        pairs["tokens"] = (network.config.codebook_size, tokenizer.codebook_size)
    else:
        pairs["channels"] = (network.config.latent_channels, tokenizer.latent_channels)
    for what, (model, codec) in pairs.items():
        if model != codec:
            raise ValueError(
                f"the model has {model} {what} and the tokenizer {codec}: "
                "they were not trained together"
            )
