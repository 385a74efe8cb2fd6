"""Recipes: one YAML file says everything about a training.

Every section is a dataclass and its fields are the keys; a key that is none of them is refused.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from tokenizers_vq.files import check_counts
from tokenizers_vq.tokenizer import MOST_PIXELS
from unicfg.settings import build, read_mapping
from unicfg.training.losses import check_noise_settings

Family = Literal["ar", "masked", "diffusion", "flow", "hybrid"]
FAMILIES: tuple[Family, ...] = get_args(Family)

MOST = 10**9  # of whatever is counted: more is a slip

# what may differ when a run is resumed: it changes no number of the training
LOGGING_SETTINGS = {"log_every", "sample_every", "checkpoint_every", "keep_checkpoints"}


@dataclass(frozen=True)
class DataRecipe:
    """Where the captioned images come from."""

    source: Literal["folder", "shapes", "datasets"] = "folder"
    # folder: images with metadata.jsonl, metadata.csv or .txt beside each. datasets: a folder, files such as
    # "data/*.tar", or a repository of the hub
    path: str = ""
    # datasets: imagefolder, parquet, webdataset, ...; "" for a repository of the hub
    format: str = ""
    revision: str = ""  # datasets: branch, tag or commit of that repository
    # datasets: the columns of picture and caption; in tar files the suffixes, such as png and txt, or json.caption
    image: str = "image"
    caption: str = "text"
    # of each process: threads that decode images, and processes that read ahead in training
    workers: int = 2
    image_size: int = 64  # pixels a side
    count: int = 20_000  # shapes: how many scenes
    wrong: float = 0.15  # shapes: share of vague or wrong captions
    unrelated: float = 0.0  # shapes: share of captions that belong to another scene
    validation: float = 0.1  # share held out, where the data names no split itself

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_counts(self, image_size=MOST_PIXELS, count=MOST)
        for name in ("wrong", "unrelated", "validation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a share in [0, 1]")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}, expected 0 or more")
        if self.format and self.source != "datasets":
            raise ValueError(
                f"format is {self.format!r} with source {self.source}, expected source datasets"
            )


@dataclass(frozen=True)
class Optimization:
    """The optimizer, with warm-up, cosine decay, gradient clipping and an exponential moving average."""

    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the matrices of transformer blocks
    steps: int = 10_000
    batch_size: int = 64  # of all processes together
    accumulate: int = 1  # passes a step and process, each with its part of the batch: less memory, the same training
    learning_rate: float = 1e-3
    final_learning_rate: float = 1e-5
    warmup: int = 200  # steps
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0  # gradient norm
    ema: float = 0.999  # decay of the moving average a step
    # of matrix products; None: bfloat16 on a GPU that has it, else float32. A CPU with bfloat16 instructions is
    # about 1.4 times as fast with it, one without is slower
    precision: Literal["float32", "bfloat16"] | None = None
    log_every: int = 20  # steps
    sample_every: int = 500  # steps between validation losses and sample grids
    checkpoint_every: int = 500  # steps
    keep_checkpoints: int = 2
    skip_not_finite: int = (
        0  # steps in a row that may be skipped as not finite before a training stops
    )
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        counts = ("steps", "batch_size", "log_every", "sample_every", "checkpoint_every")
        for name in (*counts, "keep_checkpoints", "accumulate"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(
                    f"{name} is {getattr(self, name)}, expected at least 1 and at most {MOST}"
                )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed is {self.seed}, expected at least 0 and below 2**32")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema is {self.ema}, expected a decay in [0, 1)")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number > 0")
        for name in ("final_learning_rate", "weight_decay", "warmup", "skip_not_finite"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a finite number >= 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}, expected two decays in [0, 1)")


@dataclass(frozen=True)
class TokenizerRecipe:
    """The image tokenizer: the fields of ``VQTokenizerConfig``, and how to train it; or one that is there already."""

    # a name of shipped weights, the folder of a pipeline or of a tokenizer, or a tokenizer's repository on the hub: it is
    # taken as it is, and the other keys are left alone
    pretrained: str = ""
    factor: int = 8
    width: int = 64
    depth: int = 2
    quantizer: Literal["fsq", "vq"] = "fsq"
    levels: tuple[int, ...] = (8, 5, 5, 5)
    codebook_size: int = 1024
    codebook_dim: int = 8
    adversarial: float = 0.0  # weight of the PatchGAN loss, from half of the steps on; 0 is off
    flip: bool = True  # mirror half of the images, at random; the tokenizer sees no captions
    training: Optimization = field(default_factory=Optimization)

    def __post_init__(self) -> None:
        """Refuse settings of a training where there is none, and an optimizer that has nothing to work on."""
        if self.training.optimizer == "muon":
            raise ValueError("optimizer is 'muon', expected 'adamw': a tokenizer has no blocks")
        if self.pretrained:
            changed = [
                own.name
                for own in fields(self)
                if own.name != "pretrained"
                and getattr(self, own.name)
                != (own.default if own.default is not MISSING else Optimization())
            ]
            if changed:
                raise ValueError(
                    f"pretrained is {self.pretrained!r} beside {', '.join(changed)}, expected it alone: "
                    "such a tokenizer is not trained"
                )


@dataclass(frozen=True)
class TextRecipe:
    """How captions become conditions.

    With ``bpe`` a vocabulary is learned from the training captions. With ``classes`` each distinct caption is a
    class, of length 1, and the other keys have no meaning.
    """

    kind: Literal["bpe", "classes"] = "bpe"
    vocabulary: int = 2048
    length: int = 32  # tokens of the prefix

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_counts(self, vocabulary=1 << 24, length=1 << 12)


@dataclass(frozen=True)
class NoiseRecipe:
    """Diffusion, flow and hybrid: how noise is added in training, and what is predicted. None: as the family does."""

    path: str | None = (
        None  # a key of sampling.paths.PATHS; diffusion cosine, flow and hybrid straight
    )
    space: str | None = None  # eps, x0, v, flow or score; diffusion v, flow and hybrid flow
    time: Literal["uniform", "logit-normal"] | None = None  # uniform, for flow logit-normal
    shift: float = 1.0  # moves times towards the noise
    min_snr: float | None = None  # gamma of min-SNR weighting

    def __post_init__(self) -> None:
        """Check the ranges."""
        check_noise_settings(self.shift, self.min_snr, "noise: ")


@dataclass(frozen=True)
class HeadRecipe:
    """Hybrid: the diffusion head, and the order in which tokens are drawn."""

    order: Literal["causal", "masked"] = "causal"
    width: int = 256
    depth: int = (
        2  # a sampler runs the head many times on few rows: a wide one is faster than a deep one
    )
    draws: int = 4  # noise draws a token and training step
    context_noise: float = 0.0  # most of the noise on the latents that the transformer sees

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("width", "depth", "draws"):
            if not 1 <= getattr(self, name) <= MOST:
                raise ValueError(
                    f"head: {name} is {getattr(self, name)}, expected at least 1 and at most {MOST}"
                )
        if not 0 <= self.context_noise < math.inf:
            raise ValueError(
                f"head: context_noise is {self.context_noise}, expected a finite number >= 0"
            )


@dataclass(frozen=True)
class ModelRecipe:
    """The model: its family and the fields of its configuration."""

    family: Family = "ar"
    width: int = 256
    depth: int = 6
    heads: int = 4
    dropout: float = 0.0
    patch: int = 1  # diffusion and flow: latents a side that make one token
    noise: NoiseRecipe = field(default_factory=NoiseRecipe)
    head: HeadRecipe = field(default_factory=HeadRecipe)
    condition_dropout: float = 0.1  # share of samples trained without their condition
    crops: int = (
        1  # encodings of each training image: the first as it is, the others shifted at random
    )
    shift: int = 0  # pixels, at most, by which the others are shifted
    training: Optimization = field(default_factory=Optimization)

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(
                f"condition_dropout is {self.condition_dropout}, expected a share between 0 and 1"
            )
        if self.crops < 1:
            raise ValueError(f"crops is {self.crops}, expected at least 1")
        if self.shift < 0 or (self.crops > 1) != (self.shift > 0):
            raise ValueError(
                f"crops is {self.crops} and shift {self.shift}, expected both or none to be in use"
            )


@dataclass(frozen=True)
class Recipe:
    """A whole training: data, tokenizer, text, model."""

    out: str  # folder of checkpoints, logs, sample grids and the finished pipeline
    data: DataRecipe = field(default_factory=DataRecipe)
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    text: TextRecipe = field(default_factory=TextRecipe)
    model: ModelRecipe = field(default_factory=ModelRecipe)
    prompts: tuple[str, ...] = ()  # drawn in the sample grids; () takes validation captions


def load_recipe(file: Path | str, family: str | None = None) -> Recipe:
    """Read a recipe.

    A section ``families`` may say, for each family, what differs from the section ``model``.

    Args:
        file: YAML.
        family: one to train instead of the recipe's ``model: family``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no YAML mapping, a key is unknown or missing, or a value is of another type or out
            of its range; names the key and what was expected.
    """
    values = _with_family(read_mapping(file, "recipe"), family, str(file))
    return build(Recipe, values, str(file))


def _with_family(values: dict[str, Any], family: str | None, where: str) -> dict[str, Any]:
    """The values without the section ``families``; what it says of the chosen family stands in ``model``."""
    own = values.get("families", {})
    model = values.get("model", {})
    values = {key: value for key, value in values.items() if key != "families"}
    for key, section in (("model", model), ("families", own)):
        if not isinstance(section, dict):
            raise ValueError(f"{where}: {key} is {section!r}, expected a section of keys")
    chosen = family or model.get("family", ModelRecipe.family)
    for name in (*own, chosen):
        if name not in FAMILIES:
            raise ValueError(f"{where}: family is {name!r}, expected one of {', '.join(FAMILIES)}")
    values["model"] = _merged(model, own.get(chosen) or {}) | {"family": chosen}
    return values


def _merged(values: dict[str, Any], changes: Any) -> dict[str, Any]:
    """Nested keys of ``changes`` replace those of ``values``."""
    if not isinstance(changes, dict):
        raise ValueError(f"families: {changes!r}, expected a section of keys")
    merged = dict(values)
    for key, value in changes.items():
        before = merged.get(key)
        merged[key] = (
            _merged(before, value)
            if isinstance(before, dict) and isinstance(value, dict)
            else value
        )
    return merged
