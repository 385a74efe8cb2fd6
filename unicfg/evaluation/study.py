"""A study: families, variants of guidance and scales as a grid, every cell drawn and measured once.

Finished cells are kept: a study that was stopped goes on where it was, and several processes share the cells.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from models import TextToImage
from models.folders import held_families
from tokenizers_vq.hub import write_text_atomically
from tokenizers_vq.images import to_images
from unicfg.evaluation import (
    accuracy,
    attributes,
    burn,
    captions,
    diversity,
    features,
    fidelity,
    measuring,
    tasks,
    uncertainty,
)
from unicfg.evaluation.measuring import Drawn, Measuring, shown
from unicfg.evaluation.provenance import settings_of, versions
from unicfg.evaluation.results import COLUMNS, Cell, CellResult, Results, plain
from unicfg.evaluation.tasks import Task, read_task
from unicfg.guidance import Guidance
from unicfg.guidance.spelling import read_guidance
from unicfg.pictures import save_picture
from unicfg.sampling import Recorder, Step, TokenStep, UnmaskingStep, recorder
from unicfg.settings import build, read_mapping

BATCH = 64  # images drawn at once
ON_THEIR_WAY = 2  # images of a cell that are shown at several moments
MOMENTS = 8
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0)


@dataclass(frozen=True)
class Variant:
    """One way to guide, at every scale of the study.

    Attributes:
        name: for people.
        scale: a schedule of s as :func:`unicfg.guidance.spelling.read_scale` takes it, as in "interval(s, 0.2, 0.8)".
        mitigations: as :func:`unicfg.guidance.spelling.read_mitigations` takes them, as in "tcfg + mimic_scale(3)".
        scales: only these of the study's; () is all of them.
    """

    name: str = "plain"
    scale: str = "s"
    mitigations: str = ""
    scales: tuple[float, ...] = ()

    def at(self, s: float) -> Guidance:
        """The guidance at a scale.

        Raises:
            ValueError: if a text cannot be read.
        """
        return read_guidance(self.scale, s, self.mitigations)


@dataclass(frozen=True)
class Study:
    """The settings of a study: all it takes to make it again.

    Attributes:
        weights: shipped weights, a folder, or a hub repository.
        data: what is asked for, see :func:`unicfg.evaluation.tasks.read_task`.
        n: images a cell.
        families: () is all that the weights hold.
        scales: s, none twice.
        variants: of guidance; a variant whose mitigations have no meaning for a family is left out there.
        seed: of a cell's first image; the next has seed + 1.
        draws: images of each open prompt, for what is diverse within a prompt; 0 leaves that out.
        open_prompts: to be drawn many times; () takes those that suit the data.
        features: "lite0", "pixels", or "package.module:function", see :func:`unicfg.evaluation.features.find_features`.

    Raises:
        ValueError: if a number is out of its range, a value comes twice, or a variant cannot be read.
    """

    weights: str = "shapes"
    data: str = "shapes"
    n: int = 256
    families: tuple[str, ...] = ()
    scales: tuple[float, ...] = SCALES
    variants: tuple[Variant, ...] = (Variant(),)
    seed: int = 0
    draws: int = 32
    open_prompts: tuple[str, ...] = ()
    features: str = "lite0"

    def __post_init__(self) -> None:
        """Check all that can be checked before weights are read."""
        for name, least in (("n", 1), ("seed", 0), ("draws", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, expected an int of at least {least}")
        names = [variant.name for variant in self.variants]
        cells = [Cell("", name, 0.0).folder for name in names]
        for what, values in (
            ("families", self.families),
            ("scales", self.scales),
            ("variants", names),
            ("variants", cells),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} is {list(values)}, expected none twice")
        for what, group in (("scales", self.scales), ("variants", self.variants)):
            if not group:
                raise ValueError(f"{what} is empty, expected at least one")
        for variant in self.variants:
            for s in variant.scales or self.scales:
                if s not in self.scales:
                    raise ValueError(
                        f"the variant {variant.name!r} has the scale {s:g}, expected some of {list(self.scales)}"
                    )
                variant.at(s)


def read_study(file: Path | str) -> Study:
    """A study from a YAML file, or from the ``study.json`` of a finished one.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no study; names the key and what was expected.
    """
    values = read_mapping(file, "study")
    values = values.get("study", values)
    if not isinstance(values, dict):
        raise ValueError(f"{file}: study is {values!r}, expected a section of keys")
    values = dict(values)
    if isinstance(values.get("variants"), list):
        values["variants"] = [
            asdict(build(Variant, own, f"{file}: variants")) if isinstance(own, dict) else own
            for own in values["variants"]
        ]
    return build(Study, values, str(file))


def run(study: Study, out: Path | str, *, command: str = "", progress: bool = True) -> Results:
    """Draw and measure every cell that is not there yet.

    Started by ``torchrun`` or ``accelerate launch``, the processes share the cells, and the first one waits for the others.

    Args:
        study: what to do.
        out: the folder, see :mod:`unicfg.evaluation.results`; made if need be.
        command: by which it can be repeated, for the report.
        progress: show a progress bar.

    Returns:
        what the folder holds when all cells are there (in the first process), or this process's are.

    Raises:
        FileNotFoundError: if there are no such weights or data.
        ValueError: if the weights do not hold a family, or ``out`` holds another study.
        OSError: if something cannot be written; what is finished stays.
        ImportError: if a measure needs what is not installed; names the extra.
    """
    from accelerate import PartialState

    # one process may be done long before another; without cpu= it takes no notice of the others where there is no GPU
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    out = Path(out)
    families = study.families or tuple(held_families(study.weights))
    pipes = {family: TextToImage.from_pretrained(study.weights, family) for family in families}
    if state.device.type == "cuda":
        for pipe in pipes.values():
            pipe.to(state.device)
    tokenizer = next(iter(pipes.values())).tokenizer
    task = read_task(study.data, study.n, tokenizer.config.image_size, study.open_prompts)
    jobs = list(_grid(study, pipes))
    if state.is_main_process:
        _open(study, out, task, pipes, command)
    state.wait_for_everyone()
    measuring = Measuring(task, study.features, tokenizer)
    if state.is_main_process:
        _refer(out, measuring, _hash(_common(study, task), pipes[families[0]].digest()))
    with tqdm(
        jobs[state.process_index :: state.num_processes],
        desc="cells",
        unit="cell",
        disable=not (progress and state.is_main_process),
    ) as bar:
        for cell, variant in bar:
            bar.set_postfix_str(str(cell))
            _finish(cell, variant, study, task, pipes[cell.family], measuring, out / cell.folder)
    state.wait_for_everyone()
    return Results.load(out)


def _grid(study: Study, pipes: Mapping[str, TextToImage]) -> Iterator[tuple[Cell, Variant]]:
    """Every cell; variants whose mitigations have no meaning for a family are left out there."""
    for family, pipe in pipes.items():
        space = getattr(pipe.network, "space", None) or "logits"
        if pipe.family == "hybrid":
            space = pipe.network.head.space  # type: ignore[union-attr]
        for variant in study.variants:
            for s in study.scales:
                if variant.scales and s not in variant.scales:
                    continue
                try:
                    variant.at(s).begin(space)
                except ValueError:
                    break
                yield Cell(family, variant.name, s), variant


def _finish(
    cell: Cell,
    variant: Variant,
    study: Study,
    task: Task,
    pipe: TextToImage,
    measuring: Measuring,
    folder: Path,
) -> None:
    """Draw and measure one cell, unless that was done with the same settings."""
    how = [pipe.digest(), pipe.sampler_settings(), variant.scale, variant.mitigations, cell.s]
    made_with = _hash(_common(study, task), how)
    file = folder / "cell.json"
    with suppress(OSError, ValueError, KeyError):  # a cell that cannot be read is drawn again
        if CellResult.from_json(json.loads(file.read_text("utf-8"))).made_with == made_with:
            return
    try:
        drawn = _draw(pipe, study, task, variant.at(cell.s))
        if not bool(drawn.images.isfinite().all()):
            raise FloatingPointError("the images are not finite")
        tally = measuring.cell(drawn)
        places = pipe.network.config.grid
        result = CellResult(
            cell, tally.measures, tally.missing, shown(drawn.trace, places), None, made_with
        )
        save_picture(_sheet(drawn.images, COLUMNS), folder / "images.png")
        save_picture(_on_its_way(pipe, study, task, variant.at(cell.s)), folder / "steps.png")
    except (FloatingPointError, ValueError) as error:
        result = CellResult(cell, failure=str(error), made_with=made_with)
    write_text_atomically(json.dumps(result.to_json()) + "\n", file)


def _draw(pipe: TextToImage, study: Study, task: Task, guidance: Guidance) -> Drawn:
    """All images of a cell."""
    watch, last = Recorder(), _LastTokens()

    def see(step: Step) -> None:
        watch(step)
        last(step)

    start = time.perf_counter()
    images = pipe.sample(
        task.prompts,
        seeds=range(study.seed, study.seed + len(task.prompts)),
        guidance=guidance,
        batch_size=BATCH,
        callback=see,
        head_callback=watch.head if pipe.family == "hybrid" else None,
    ).cpu()
    seconds = (time.perf_counter() - start) / len(images)
    start = time.perf_counter()
    opened = [
        pipe.sample(
            [prompt] * study.draws,
            seeds=range(study.seed, study.seed + study.draws),
            guidance=guidance,
            batch_size=BATCH,
        ).cpu()
        for prompt in (task.open_prompts if study.draws else ())
    ]
    if opened:  # these were drawn with nobody watching, which takes its time
        seconds = (time.perf_counter() - start) / (len(opened) * study.draws)
    ids = last.ids(pipe.network.config.grid)
    return Drawn(images, torch.cat([images[:0], *opened]), ids, watch.trace(), seconds)


class _LastTokens:
    """Keeps the finished tokens of every batch."""

    def __init__(self) -> None:
        self.batches: list[Tensor] = []

    def __call__(self, step: Step) -> None:
        if not isinstance(step, TokenStep | UnmaskingStep):
            return
        if step.index == 0:
            self.batches.append(step.ids)
        self.batches[-1] = step.ids

    def ids(self, side: int) -> Tensor | None:
        """Of all images (N, h, w); None of a family that has none."""
        if not self.batches:
            return None
        return torch.cat(self.batches).cpu().unflatten(1, (side, side))


def _on_its_way(pipe: TextToImage, study: Study, task: Task, guidance: Guidance) -> Image.Image:
    """The first images at several moments: a row an image."""
    count = min(ON_THEIR_WAY, len(task.prompts))
    steps = pipe.num_steps()
    moments = {round(i * (steps - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}
    seen: list[Tensor] = []

    def look(step: Step) -> None:
        if step.index in moments:
            seen.append(pipe.preview(step))

    pipe.sample(
        task.prompts[:count],
        seeds=range(study.seed, study.seed + count),
        guidance=guidance,
        callback=look,
    )
    return _sheet(torch.stack(seen, 1).flatten(0, 1), len(seen))


def _sheet(images: Tensor, columns: int) -> Image.Image:
    """Images (N, 3, H, W) side by side, without gaps."""
    pictures = to_images(images)
    width, height = pictures[0].size
    sheet = Image.new(
        "RGB", (width * min(columns, len(pictures)), height * -(-len(pictures) // columns))
    )
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * width, i // columns * height))
    return sheet


def _refer(out: Path, measuring: Measuring, made_with: str) -> None:
    """Measure the real images, unless that was done."""
    file = out / "reference.json"
    with suppress(OSError, ValueError, KeyError):
        if json.loads(file.read_text("utf-8"))["made_with"] == made_with:
            return
    measures = {name: plain(own) for name, own in measuring.references().items()}
    held = {"made_with": made_with, "measures": measures}
    write_text_atomically(json.dumps(held, indent=1) + "\n", file)


# what may differ where a study goes on: other cells of the same images
AXES = ("families", "scales", "variants")


def _open(
    study: Study, out: Path, task: Task, pipes: Mapping[str, TextToImage], command: str
) -> None:
    """Write ``study.json``, if the folder is new or holds this study.

    Raises:
        ValueError: if it holds another study, or something else.
    """
    file = out / "study.json"
    settings = json.loads(json.dumps(asdict(study) | {"families": list(pipes)}))
    if file.is_file():
        held = json.loads(file.read_text("utf-8"))["study"]
        other = [
            f"{name} ({held.get(name)!r} there, {value!r} here)"
            for name, value in settings.items()
            if name not in AXES and held.get(name) != value
        ]
        if other:
            raise ValueError(
                f"{out} holds another study, which differs in {', '.join(other)}: expected another folder"
            )
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there and holds no study: expected a new or an empty folder")
    described = {
        "study": settings,
        "families": list(pipes),
        "scales": list(study.scales),
        "variants": {own["name"]: own for own in settings["variants"]},
        "prompts": list(task.prompts),
        "open_prompts": list(task.open_prompts),
        "captions": len(set(task.prompts)),
        "n": study.n,
        "weights": study.weights,
        "families_settings": {family: settings_of(pipe) for family, pipe in pipes.items()},
        "versions": versions(),
        "date": f"{datetime.now():%Y-%m-%d}",
        "command": command,
    }
    write_text_atomically(json.dumps(described, indent=1) + "\n", file)


def _common(study: Study, task: Task) -> list[Any]:
    """What all cells depend on: prompts, seeds, and the code that measures."""
    code = [
        inspect.getsource(module)
        for module in (
            accuracy,
            attributes,
            burn,
            captions,
            diversity,
            features,
            fidelity,
            measuring,
            recorder,
            tasks,
            uncertainty,
        )
    ]
    return [task.prompts, task.open_prompts, study.seed, study.draws, study.features, code]


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
