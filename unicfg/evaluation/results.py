"""What a study found: one cell for each family, variant of guidance and scale, and the folder that holds them.

study.json            the settings: all it takes to make the study again
reference.json        the same measures of real images, of their reconstructions, and of what is known to be bad
cells/FAMILY/VARIANT-sSCALE/
    cell.json         one :class:`CellResult`, written last: a cell without it is drawn again
    images.png        every image, ``COLUMNS`` a row, without gaps
    steps.png         the first prompts on their way: a row an image, a column a moment, without gaps
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tokenizers_vq.files import check_format_version, read_json, shortened

COLUMNS = 16  # images a row in images.png
MOST_STUDY_BYTES = 1 << 26  # of a file of a study
MOST_STUDY_CELLS = 100_000  # of all families together
Group = Literal["adherence", "diversity", "fidelity", "burn", "strength", "cost"]


class Estimate(NamedTuple):
    """A number and how far it may be off.

    Attributes:
        value: the estimate.
        error: its standard error; NaN where it has none.
        n: of how many images.
    """

    value: float
    error: float
    n: int


class TooFew(ValueError):
    """There are not enough images for a number that means something."""


@dataclass(frozen=True)
class About:
    """What a measure means.

    Attributes:
        label: for people.
        group: which question it answers.
        better: 1 where more is better, -1 where less is, 0 where near the real images is.
        factor: shown is this times the value, as in percent.
        unit: of what is shown.
        digits: after the point.
    """

    label: str
    group: Group
    better: Literal[-1, 0, 1]
    factor: float = 1.0
    unit: str = ""
    digits: int = 2


MEASURES: Mapping[str, About] = {
    "attributes": About("attributes right", "adherence", 1, 100, "%", 1),
    "whole_scene": About("whole scenes right", "adherence", 1, 100, "%", 1),
    "caption_top5": About("right caption among the first 5", "adherence", 1, 100, "%", 1),
    "caption_rank": About("mean rank of the right caption", "adherence", -1, 1, "", 1),
    "open_entropy": About("entropy of what prompts leave open", "diversity", 1, 1, "bits"),
    "readable": About("open attributes that can be read", "diversity", 1, 100, "%", 1),
    "vendi": About("Vendi score within a prompt", "diversity", 1, 1, "images"),
    "distance": About("feature distance within a prompt", "diversity", 1),
    "recall": About("recall", "diversity", 1, 100, "%", 1),
    "coverage": About("coverage", "diversity", 1, 100, "%", 1),
    "kid": About("KID x 1000", "fidelity", -1, 1000, "", 1),
    "fd": About("Fréchet distance", "fidelity", -1, 1, "", 1),
    "precision": About("precision", "fidelity", 1, 100, "%", 1),
    "density": About("density", "fidelity", 1),
    "clipped": About("clipped pixels", "burn", 0, 100, "%", 1),
    "chroma": About("chroma", "burn", 0, 100, "%", 1),
    "contrast": About("contrast", "burn", 0, 100, "%", 1),
    "entropy": About("entropy of the guided softmax", "burn", 0, 1, "nats a token"),
    "codebook": About("codebook used", "burn", 0, 100, "%", 1),
    "repetition": About("tokens like their neighbour", "burn", 0, 100, "%", 1),
    "strength": About("KL(guided || cond)", "strength", 0, 1, "nats an image"),
    "positions": About("token positions an image", "cost", -1, 1, "", 0),
    "seconds": About("seconds an image", "cost", -1, 1, "s", 3),
    "rate": About("images a second", "cost", 1, 1, "", 1),
}


@dataclass(frozen=True)
class Cell:
    """Which cell of the grid.

    Attributes:
        family: "ar", "masked", ...
        variant: name of the variant of guidance; "plain" is the formula and nothing else.
        s: the scale.
    """

    family: str
    variant: str
    s: float

    @property
    def curve(self) -> str:
        """What cells of all scales share, as a key: no family has a slash in its name."""
        return f"{self.family}/{self.variant}"

    @property
    def folder(self) -> str:
        """Where the cell lies in the study's folder; another for every cell."""
        words = re.sub(r"[^A-Za-z0-9.+=-]+", "_", self.variant).strip("_")[:40]
        if words != self.variant:  # letters were lost, and with them what tells it from another
            words += "-" + hashlib.sha256(self.variant.encode()).hexdigest()[:6]
        return f"cells/{self.family}/{words}-s{scale_text(self.s)}"

    def __str__(self) -> str:
        """For people."""
        what = "" if self.variant == "plain" else f" {self.variant}"
        return f"{self.family}{what} s={self.s:g}"


def read_settings(file: Path) -> dict[str, Any]:
    """What ``study.json`` holds.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is another file of this name, is damaged, or was written by another release.
    """
    try:
        held = read_json(file, MOST_STUDY_BYTES)
        check_format_version(held)
        _check_settings(held)
    except ValueError as error:
        raise ValueError(
            f"{file} is not the settings of a study ({shortened(error)}): expected another folder"
        ) from error
    return held


def _check_settings(held: Mapping[str, Any]) -> None:
    """Refuse settings from which the cells cannot be found.

    Raises:
        ValueError: names the key.
    """
    kinds = {"families": list, "scales": list, "variants": dict, "study": dict}
    for key, kind in (kinds | {"sources": dict} if "sources" in held else kinds).items():
        if not isinstance(held.get(key), kind):
            raise ValueError(f"{key} is {held.get(key)!r:.100}, expected a {kind.__name__}")
    for family in held["families"]:
        # it names a folder
        if not isinstance(family, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", family):
            raise ValueError(f"families holds {family!r:.100}, expected letters and digits")
    for s in held["scales"]:
        finite_number(s, "one of scales")
    for name, own in held["variants"].items():
        if not isinstance(own, dict):
            raise ValueError(f"the variant {name!r:.100} is {own!r:.100}, expected an object")
    cells = len(held["families"]) * len(held["variants"]) * len(held["scales"])
    if cells > MOST_STUDY_CELLS:
        raise ValueError(f"it has {cells} cells, expected at most {MOST_STUDY_CELLS}")


def scale_text(scale: float) -> str:
    """A scale in a file name: short, and another for every scale."""
    return f"{scale:.17g}" if float(f"{scale:g}") != scale else f"{scale:g}"


@dataclass(frozen=True)
class CellResult:
    """What one cell gave.

    Attributes:
        cell: which.
        measures: by name, see ``MEASURES``.
        missing: why a measure has no number, by name.
        trace: means over the samples at each step, lists of one length: "progress", "scale", "distance" ||guided - cond||,
            "kl" in nats, "entropy" in nats, "cosine" of cond and uncond, "saturation", "changed" (chance that guidance
            drew another token); None where a family has no such number. And "places", KL by place of the image, rows
            of columns.
        failure: why there are no images; None where there are.
        made_with: a hash of all that the numbers depend on: weights, sampler, prompts, seeds, measures.
        source: a hash of that part of it which all cells of a family share.
    """

    cell: Cell
    measures: Mapping[str, Estimate] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    trace: Mapping[str, Any] = field(default_factory=dict)
    failure: str | None = None
    made_with: str = ""
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """For ``cell.json`` and the lines of ``results.jsonl``."""
        return {
            "family": self.cell.family,
            "variant": self.cell.variant,
            "s": self.cell.s,
            "measures": plain(self.measures),
            "missing": dict(self.missing),
            "trace": dict(self.trace),
            "failure": self.failure,
            "made_with": self.made_with,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, held: Mapping[str, Any]) -> CellResult:
        """From what :meth:`to_json` made.

        Raises:
            ValueError: if a key is missing, or a value of another kind; names it.
        """
        texts = {"family": str, "variant": str, "made_with": str, "source": str}
        for key, kind in (texts | {"missing": dict, "trace": dict}).items():
            if not isinstance(held.get(key), kind):
                raise ValueError(f"{key} is {held.get(key)!r:.100}, expected a {kind.__name__}")
        if not isinstance(failure := held.get("failure"), str | None):
            raise ValueError(f"failure is {failure!r:.100}, expected a str or null")
        return cls(
            Cell(held["family"], held["variant"], finite_number(held.get("s"), "s")),
            estimates(held.get("measures")),
            held["missing"],
            held["trace"],
            failure,
            held["made_with"],
            held["source"],
        )


def plain(measures: Mapping[str, Estimate]) -> dict[str, dict[str, float | None]]:
    """Estimates by name for JSON, in which NaN is null."""
    return {
        name: {key: v if math.isfinite(v) else None for key, v in own._asdict().items()}
        for name, own in measures.items()
    }


def estimates(held: Any) -> dict[str, Estimate]:
    """Estimates by name, from JSON, in which NaN is null.

    Raises:
        ValueError: if they are none.
    """
    if not isinstance(held, Mapping):
        raise ValueError(f"measures is {held!r:.100}, expected an object")
    found = {}
    for name, own in held.items():
        if not isinstance(own, Mapping) or own.keys() != set(Estimate._fields):
            raise ValueError(f"{name} is {own!r:.100}, expected value, error and n")
        value, error = (
            math.nan if own[key] is None else finite_number(own[key], f"{name}: {key}")
            for key in ("value", "error")
        )
        found[name] = Estimate(value, error, int(finite_number(own["n"], f"{name}: n")))
    return found


def finite_number(held: Any, where: str) -> float:
    """A finite number.

    Raises:
        ValueError: if it is none.
    """
    if isinstance(held, bool) or not isinstance(held, int | float) or not abs(held) < 1e300:
        raise ValueError(f"{where} is {held!r:.100}, expected a finite number")
    return held


def read_cell(file: Path) -> CellResult:
    """What ``cell.json`` holds.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if it cannot be read.
        ValueError: if it is damaged; names the file.
    """
    held = read_json(file, MOST_STUDY_BYTES)
    try:
        return CellResult.from_json(held)
    except ValueError as error:
        raise ValueError(
            f"{file}: {error}; remove it, and the study draws this cell anew"
        ) from error


@dataclass(frozen=True)
class Results:
    """A whole study, or what there is of it.

    Attributes:
        settings: as in ``study.json``: "families", "scales", "variants" (name -> how it is written), "prompts" and more.
        reference: measures by what they are of: "real images", "reconstructions", "shuffled captions".
        cells: in the order of families, variants and scales; those that are finished.
        folder: where the pictures are.
    """

    settings: Mapping[str, Any]
    reference: Mapping[str, Mapping[str, Estimate]]
    cells: tuple[CellResult, ...]
    folder: Path

    @classmethod
    def load(cls, folder: Path | str) -> Results:
        """Read a study's folder; cells that were made with other weights, data or code than the last run had are left out.

        Raises:
            FileNotFoundError: if there is no study.
            OSError: if a file cannot be read.
            ValueError: if a file is damaged, or another release wrote it; names it.
        """
        folder = Path(folder)
        file = folder / "study.json"
        if not file.is_file():
            raise FileNotFoundError(f"no study in {folder}: expected the file {file.name} there")
        settings = read_settings(file)
        grid = [
            Cell(family, variant, s)
            for family in settings["families"]
            for variant in settings["variants"]
            for s in settings["scales"]
        ]
        every = []
        for cell in grid:
            file = folder / cell.folder / "cell.json"
            if not file.is_file():
                continue
            result = read_cell(file)
            if result.cell != cell:
                raise ValueError(f"{file} is of the cell {result.cell}, expected {cell}")
            every.append(result)
        # cells of weights, code or data that are no longer those of their family are drawn again by the next run
        sources = settings.get("sources", {})
        found = [own for own in every if _source(sources, own) == own.source]
        return cls(settings, _references(folder / "reference.json"), tuple(found), folder)

    def of(self, family: str, variant: str = "plain") -> list[CellResult]:
        """The cells of one curve that have images, by scale."""
        own = [
            result
            for result in self.cells
            if (result.cell.family, result.cell.variant) == (family, variant)
            and result.failure is None
        ]
        return sorted(own, key=lambda result: result.cell.s)


def _source(sources: Mapping[str, str], result: CellResult) -> str:
    """What a cell is to be made with: that of its curve, where it runs other weights besides, or of its family."""
    cell = result.cell
    return sources.get(cell.curve, sources.get(cell.family, result.source))


def _references(file: Path) -> dict[str, dict[str, Estimate]]:
    """What ``reference.json`` holds; nothing where there is none.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is damaged; names the file.
    """
    if not file.is_file():
        return {}
    measures = read_json(file, MOST_STUDY_BYTES).get("measures")
    try:
        if not isinstance(measures, dict):
            raise ValueError(f"measures is {measures!r:.100}, expected an object")
        return {name: estimates(own) for name, own in measures.items()}
    except ValueError as error:
        raise ValueError(f"{file}: {error}; remove it, and the study measures it anew") from error
