"""Variants of guidance and sampling that a study draws at each of its scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from models import TextToImage
from models.perturb import perturb_attention, skip_layers
from models.pipeline import OPTIONS, BranchLike, Options
from unicfg.evaluation.results import finite_number
from unicfg.guidance import Guidance
from unicfg.guidance.spelling import read_guidance
from unicfg.sampling import Branch

MOST = 1_000_000  # of an option that is a whole number
SHARPENING = {"temperature", "top_k", "top_p"}  # of tokens, after guidance
# the options of a call that a file can hold: those that are a number or a text
SAMPLER_OPTIONS = {
    name: kind
    for name, hint in get_type_hints(Options).items()
    for kind in (int, float, str)
    if hint in (kind, kind | None)
}
WEIGHTS = "weights"
PERTURBATIONS = {"skip_layers": skip_layers, "perturb_attention": perturb_attention}
USUAL_BRANCHES = {"cond", "uncond"}


@dataclass(frozen=True)
class Variant:
    """One way to guide and to sample, at every scale of the study.

    Attributes:
        name: for people.
        scale: a schedule of s or weights of branches as :func:`unicfg.guidance.spelling.read_guidance` takes them, as in
            "interval(s, 0.2, 0.8)" or "weak(s)".
        mitigations: as :func:`unicfg.guidance.spelling.read_mitigations` takes them, as in "tcfg + mimic_scale(3)".
        scales: only these of the study's; () is all of them.
        sampler: options of :meth:`models.TextToImage.__call__` that are numbers or texts, as in {"temperature": 0.5}.
        branches: what runs in each branch that ``scale`` names beside cond and uncond. A text is the prompt there;
            {"weights": "runs/early"} is the same family of other weights, {"skip_layers": [3]} and {"perturb_attention": [3]}
            the family's own network made worse, see :mod:`models.perturb`.

    Raises:
        ValueError: if there is no such option, or a value is of another type; says which variant and what was expected.
    """

    name: str = "plain"
    scale: str = "s"
    mitigations: str = ""
    scales: tuple[float, ...] = ()
    # no dict has a hash
    sampler: Mapping[str, Any] = field(default_factory=dict, hash=False)
    branches: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Keep scales as floats, as those of the study, and options as their types."""
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        own = {name: self._typed(name, value) for name, value in self.sampler.items()}
        object.__setattr__(self, "sampler", own)
        for branch, value in self.branches.items():
            self._check_branch(branch, value)

    def _typed(self, name: str, value: object) -> int | float | str:
        """An option's value; samplers check ranges, and leave types to the type checker, which a file does not pass."""
        where, kind = f"the variant {self.name!r}: {name}", SAMPLER_OPTIONS.get(name)
        if kind is float:
            return float(finite_number(value, where))
        if kind is int:
            if isinstance(value, int) and not isinstance(value, bool) and value <= MOST:
                return value
            wanted = f"expected an int of at most {MOST}"
        elif kind is str:
            if isinstance(value, str):
                return value
            wanted = "expected a text"
        else:
            wanted = (
                f"which is no option of a variant: expected one of {', '.join(SAMPLER_OPTIONS)}"
            )
        raise ValueError(f"{where} is {value!r:.100}, {wanted}")

    def _check_branch(self, name: str, value: object) -> None:
        """Refuse what says neither a prompt nor a network."""
        if isinstance(value, str):
            return
        if isinstance(value, Mapping) and len(value) == 1:
            ((kind, what),) = value.items()
            if kind == WEIGHTS and isinstance(what, str):
                return
            if (
                kind in PERTURBATIONS
                and isinstance(what, list)
                and all(type(n) is int for n in what)
            ):
                return
        raise ValueError(
            f"the variant {self.name!r}: the branch {name!r} is {value!r:.100}, expected a prompt, {{{WEIGHTS}: NAME}}, "
            + " or ".join(f"{{{kind}: [LAYER]}}" for kind in PERTURBATIONS)
        )

    def at(self, s: float) -> Guidance:
        """The guidance at a scale.

        Raises:
            ValueError: if a text cannot be read, or names other branches than the variant has.
        """
        guidance = read_guidance(self.scale, s, self.mitigations)
        needed = {*guidance.branch_names} - USUAL_BRANCHES
        if needed != {*self.branches}:
            raise ValueError(
                f"the variant {self.name!r} has the branches {sorted(self.branches)}, expected {sorted(needed)}, which its "
                f"scale {self.scale!r} names"
            )
        return guidance

    def branches_for(self, pipe: TextToImage) -> dict[str, BranchLike]:
        """What a pipeline is given as ``branches``, on its device.

        Raises:
            FileNotFoundError: if there are no such weights.
            ValueError: if they do not hold the family, or its network has no such layer.
        """
        found: dict[str, BranchLike] = {}
        for name, value in self.branches.items():
            where = f"the variant {self.name!r}: the branch {name!r}"
            try:
                found[name] = _branch(value, pipe)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{where}: {error}") from error
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return found

    def check_fits(self, pipe: TextToImage, s: float) -> None:
        """Whether a family can be guided and sampled like this.

        Raises:
            ValueError: if a mitigation has no meaning for it, or it does not have an option.
        """
        self.at(s).begin(pipe.space)
        pipe.check_options(**self.sampler)
        for name in self.sampler.keys() - set(OPTIONS[pipe.family]):
            raise ValueError(f"the family {pipe.family} has no {name}")


def _branch(value: str | Mapping[str, Any], pipe: TextToImage) -> BranchLike:
    if isinstance(value, str):
        return value
    ((kind, what),) = value.items()
    if kind == WEIGHTS:
        return TextToImage.from_pretrained(what, pipe.family).to(pipe.device)
    return Branch(model=PERTURBATIONS[kind](pipe.network, what))
