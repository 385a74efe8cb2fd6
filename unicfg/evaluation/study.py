"""A study: families, variants of guidance and scales as a grid, every cell drawn and measured once.

Finished cells are kept: a study that was stopped goes on where it was, and several processes share the cells.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from models import TextToImage, TokenTransformer
from models.folders import find_weights, held_families
from models.pipeline import BranchLike
from tokenizers_vq.files import FORMAT_VERSION, read_json, write_text_atomically
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
from unicfg.evaluation.features import Features
from unicfg.evaluation.measuring import Drawn, Measuring, shown
from unicfg.evaluation.provenance import settings_of, versions
from unicfg.evaluation.results import (
    COLUMNS,
    Cell,
    CellResult,
    Results,
    plain,
    read_cell,
    read_settings,
)
from unicfg.evaluation.tasks import Task, read_task
from unicfg.evaluation.variants import SHARPENING, Variant
from unicfg.generation import BATCH
from unicfg.guidance import Guidance
from unicfg.pictures import save_picture
from unicfg.processes import join_processes, wait_for_all
from unicfg.sampling import Recorder, Step, TokenStep, UnmaskingStep, recorder
from unicfg.settings import build, read_mapping

ON_THEIR_WAY = 2  # images of a cell that are shown at several moments
MOMENTS = 8
MOST_FAMILY_CELLS = 10_000
MOST = 1_000_000  # images of one cell, or of one prompt
SCALES = (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 15.0)


@dataclass(frozen=True)
class Study:
    """The settings of a study: all it takes to make it again.

    Attributes:
        weights: shipped weights, a folder, or a hub repository.
        data: what is asked for, see :func:`unicfg.evaluation.tasks.read_task`.
        n: images a cell.
        families: () is all that the weights hold.
        scales: s, none twice.
        variants: of guidance and sampling; where a family does not have a variant's options, or its mitigations no meaning
            for it, the variant is left out.
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
        # 5 and 5.0 are one scale, and are to be one in what is hashed
        object.__setattr__(self, "scales", tuple(map(float, self.scales)))
        for name, least, most in (("n", 1, MOST), ("seed", 0, 2**62), ("draws", 0, MOST)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise ValueError(f"{name} is {value!r}, expected an int from {least} to {most}")
        names = [variant.name for variant in self.variants]
        cells = [Cell("", name, 0.0).folder for name in names]
        for what, values in (
            ("families", self.families),
            ("scales", self.scales),
            ("variants", names),
            ("variants", cells),
            ("open_prompts", self.open_prompts),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"{what} is {list(values)}, expected none twice")
        for what, group in (("scales", self.scales), ("variants", self.variants)):
            if not group:
                raise ValueError(f"{what} is empty, expected at least one")
        if len(self.scales) * len(self.variants) > MOST_FAMILY_CELLS:
            raise ValueError(
                f"there are {len(self.scales)} scales and {len(self.variants)} variants, "
                f"expected at most {MOST_FAMILY_CELLS} cells a family"
            )
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
    if Path(file).suffix == ".json" and Path(file).is_file():
        values = dict(read_settings(Path(file))["study"])
    else:
        values = read_mapping(file, "study")
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
        ValueError: if the weights do not hold a family, ``out`` holds another study, or a sampler refuses an option.
        OSError: if something cannot be written, or another process is lost; what is finished stays.
        ImportError: if a measure needs what is not installed; names the extra.
    """
    state = join_processes()
    out = Path(out)
    families = study.families or tuple(held_families(study.weights))
    pipes = {family: TextToImage.from_pretrained(study.weights, family) for family in families}
    if state.device.type == "cuda":
        for pipe in pipes.values():
            pipe.to(state.device)
    tokenizer = next(iter(pipes.values())).tokenizer
    task = read_task(
        study.data,
        study.n,
        tokenizer.config.image_size,
        draws=study.draws,
        open_prompts=study.open_prompts,
        validation=_held_out_share(study.weights),
    )
    grid, left_out = _grid(study, pipes, task.prompts[0])
    settings = _settings(study, task, pipes, left_out, state.num_processes)
    _fitting(out, settings)  # refused before features are computed
    wait_for_all(state)  # all have looked before the first one writes
    work = _Work(study, task, pipes, Measuring(task, study.features, tokenizer), out)
    if state.is_main_process:
        settings |= {"command": command, "sources": work.sources(grid), "branches": _others(grid)}
        write_text_atomically(
            json.dumps(_fitting(out, settings), indent=1) + "\n", out / "study.json"
        )
        work.refer()
    wait_for_all(state)
    # what is finished is not shared out, or a process might have nothing to do
    todo = [own for own in grid if not work.is_finished(own)]
    wait_for_all(state)
    with tqdm(
        todo[state.process_index :: state.num_processes],
        desc="cells",
        unit="cell",
        disable=not (progress and state.is_main_process),
    ) as bar:
        for job in bar:
            bar.set_postfix_str(str(job.cell))
            work.finish(job, timed=state.num_processes == 1)
    wait_for_all(state)
    return Results.load(out)


def _held_out_share(weights: str) -> float:
    """The share of a folder's images that the training of these weights has held out, as far as they say it."""
    recipe = find_weights(weights, ()) / "recipe.json"  # of a run; weights that ship have none
    held = read_json(recipe) if recipe.is_file() else {}
    return float(held.get("data", {}).get("validation", tasks.HELD_OUT))


class _Job(NamedTuple):
    """One cell, and how it is drawn."""

    cell: Cell
    variant: Variant
    branches: dict[str, BranchLike]
    digests: dict[str, str]  # of other weights that branches run

    @property
    def guidance(self) -> Guidance:
        return self.variant.at(self.cell.s)

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`models.TextToImage.sample` is told beside prompts and seeds."""
        shared = {"branches": self.branches} if self.branches else {}
        return {"guidance": self.guidance, **shared, **self.variant.sampler}


def _grid(
    study: Study, pipes: Mapping[str, TextToImage], prompt: str
) -> tuple[list[_Job], list[dict[str, str]]]:
    """Every cell, and which variants are left out of which family, and why: see :class:`Study`.

    Raises:
        FileNotFoundError: if the weights of a branch are not there.
        ValueError: if a variant fits no family that the weights hold, all of them fit none of the study's, or one has an
            option that is out of its range.
    """
    jobs, left_out = [], []
    for family, pipe in pipes.items():
        for variant in study.variants:
            chosen = [s for s in study.scales if s in (variant.scales or study.scales)]
            try:
                variant.check_fits(pipe, chosen[0])
                branches = variant.branches_for(pipe)
            except ValueError as error:
                left_out.append({"family": family, "variant": variant.name, "reason": str(error)})
                continue
            digests = {
                k: own.digest() for k, own in branches.items() if isinstance(own, TextToImage)
            }
            drawn = [
                _Job(Cell(family, variant.name, s), variant, branches, digests) for s in chosen
            ]
            if variant.sampler or branches:
                _rehearse(pipe, drawn[0], prompt)
            jobs += drawn
    for variant in study.variants:
        why = [own["reason"] for own in left_out if own["variant"] == variant.name]
        if len(why) == len(pipes) and not (jobs and _fits_others(study, variant, pipes)):
            raise ValueError(f"the variant {variant.name!r} fits no family: {why[0]}")
    return jobs, left_out


def _fits_others(study: Study, variant: Variant, pipes: Mapping[str, TextToImage]) -> bool:
    """Whether a variant fits a family that the weights hold and the study leaves out."""
    for family in held_families(study.weights):
        if family not in pipes:
            with suppress(ValueError):
                pipe = TextToImage.from_pretrained(study.weights, family)
                variant.check_fits(pipe, (variant.scales or study.scales)[0])
                return True
    return False


def _others(jobs: Sequence[_Job]) -> dict[str, dict[str, str]]:
    """The weights that branches run besides those of the family: a hash of each, by curve and branch."""
    return {job.cell.curve: job.digests for job in jobs if job.digests}


class _Begun(Exception):
    """A sampling has come to its first step: the sampler has taken all that it was told."""


def _rehearse(pipe: TextToImage, job: _Job, prompt: str) -> None:
    """Begin to draw with a variant's options and stop, for it is the sampler that knows their ranges.

    Raises:
        ValueError: if it refuses one; names the variant.
    """

    def stop(step: Step) -> None:
        raise _Begun

    # outputs that are not finite are told with the cells that have them
    with suppress(_Begun, FloatingPointError):
        try:
            pipe.sample([prompt], seeds=[0], callback=stop, **job.options)
        except ValueError as error:
            raise ValueError(f"the variant {job.variant.name!r}: {error}") from error


class _Work:
    """Draws and measures the cells of one study.

    The code that the numbers depend on is read once, when the work begins: it is this code that runs.
    """

    def __init__(
        self,
        study: Study,
        task: Task,
        pipes: Mapping[str, TextToImage],
        measuring: Measuring,
        out: Path,
    ) -> None:
        self.study, self.task, self.pipes, self.measuring = study, task, pipes, measuring
        self.out = out
        self.common = _hash(
            task.prompts,
            task.open_prompts,
            [study.seed, study.draws, study.features],
            [_digest(own) for own in (task.real, task.others, task.opened)],
            None
            if task.examples is None
            else [task.examples.captions, _digest(task.examples.images)],
            [inspect.getsource(module) for module in MEASURED_BY],
            _source(measuring.features),
            versions(),
        )
        self.digests = {family: pipe.digest() for family, pipe in pipes.items()}

    def source(self, job: _Job) -> str:
        """A hash of the weights, data and code of a cell, whatever its guidance."""
        own = _hash(self.common, self.digests[job.cell.family])
        return _hash(own, job.digests) if job.digests else own

    def sources(self, jobs: Sequence[_Job]) -> dict[str, str]:
        """Of every family, and of those of its variants that run other weights besides."""
        own = {family: _hash(self.common, digest) for family, digest in self.digests.items()}
        return own | {job.cell.curve: self.source(job) for job in jobs if job.digests}

    def made_with(self, job: _Job) -> str:
        """A hash of all that a cell's numbers depend on."""
        family, variant = job.cell.family, job.variant
        settings = self.pipes[family].sampler_settings() | {**variant.sampler}
        guided = [variant.scale, variant.mitigations, job.cell.s]
        others = [dict(variant.branches), job.digests] if job.branches else []
        return _hash(self.common, self.digests[family], settings, guided, *others)

    def is_finished(self, job: _Job) -> bool:
        """Whether the cell is there, made with the same settings and code."""
        file = self.out / job.cell.folder / "cell.json"
        # a cell that cannot be read is drawn again
        with suppress(OSError, ValueError):
            return read_cell(file).made_with == self.made_with(job)
        return False

    def finish(self, job: _Job, *, timed: bool) -> None:
        """Draw and measure one cell."""
        cell, pipe, sampler = job.cell, self.pipes[job.cell.family], job.variant.sampler
        folder, made_with = self.out / cell.folder, self.made_with(job)
        source = self.source(job)
        (folder / "cell.json").unlink(missing_ok=True)  # it speaks of pictures that are replaced
        try:
            drawn = _draw(pipe, self.study, self.task, job, timed)
            way = _on_its_way(pipe, self.study, self.task, job)
        except (FloatingPointError, ValueError) as error:
            for name in ("images.png", "steps.png"):
                (folder / name).unlink(missing_ok=True)
            result = CellResult(cell, failure=str(error), made_with=made_with, source=source)
        else:
            save_picture(_sheet(drawn.images, COLUMNS), folder / "images.png")
            save_picture(way, folder / "steps.png")
            tally = self.measuring.cell(drawn)
            if not _in_head(sampler):
                tally.missing["strength"] = "the head was not run on the states of the prompt alone"
            if pipe.space == "logits" and SHARPENING & pipe.check_options(**sampler).keys():
                for name in ("strength", "entropy"):  # of the guided distribution, as recorded
                    tally.measures.pop(name, None)
                    tally.missing[name] = "it is not seen what temperature and filters leave"
            trace = shown(drawn.trace, pipe.network.config.grid)
            result = CellResult(cell, tally.measures, tally.missing, trace, None, made_with, source)
        write_text_atomically(json.dumps(result.to_json()) + "\n", folder / "cell.json")

    def refer(self) -> None:
        """Measure the real images, unless that was done."""
        file = self.out / "reference.json"
        made_with = _hash(self.common, next(iter(self.digests.values())))
        with suppress(OSError, ValueError):
            if read_json(file).get("made_with") == made_with:
                return
        measures = {name: plain(own) for name, own in self.measuring.references().items()}
        held = {"made_with": made_with, "measures": measures}
        write_text_atomically(json.dumps(held, indent=1) + "\n", file)


def _in_head(options: Mapping[str, Any]) -> bool:
    """Whether guidance that a hybrid is given acts in its head, where it can be watched."""
    return bool(options.get("guide_at", "head") == "head")


def _draw(pipe: TextToImage, study: Study, task: Task, job: _Job, timed: bool) -> Drawn:
    """All images of a cell."""
    watch, last = Recorder(), _LastTokens()
    in_head = pipe.family == "hybrid" and _in_head(job.variant.sampler)

    def see(step: Step) -> None:
        watch(step)
        last(step)

    # a step may take fewer rows than it has branches ("refresh"), or twice as many ("heun")
    positions: list[int] = []

    def count(network: nn.Module, inputs: tuple[Any, ...]) -> None:
        positions.append(len(inputs[0]) * _positions(network))

    with ExitStack() as hooks:
        for network in _networks(pipe, job.branches):
            hooks.enter_context(network.register_forward_pre_hook(count))
        images = pipe.sample(
            task.prompts,
            seeds=range(study.seed, study.seed + len(task.prompts)),
            batch_size=BATCH,
            callback=see,
            head_callback=watch.head if in_head else None,
            **job.options,
        ).cpu()
    opened, seconds = [images[:0]], []
    for prompt in task.open_prompts if study.draws else ():
        start = time.perf_counter()
        opened.append(
            pipe.sample(
                [prompt] * study.draws,
                seeds=range(study.seed, study.seed + study.draws),
                batch_size=BATCH,
                **job.options,
            ).cpu()
        )
        seconds.append((time.perf_counter() - start) / study.draws)
    trace, side = watch.trace(), pipe.network.config.grid
    cost = sum(positions) // len(images)
    if not positions:  # "ar" and "hybrid" call parts of the network, on the rows that a step needs
        cost = int(trace.branches.sum()) * _positions(pipe.network)
    return Drawn(
        images,
        torch.cat(opened),
        last.ids(side),
        trace,
        cost,
        torch.tensor(seconds if timed else []),
    )


def _networks(pipe: TextToImage, branches: Mapping[str, BranchLike]) -> list[nn.Module]:
    """All that run: the pipeline's, and those of branches that have another."""
    networks: list[nn.Module] = [pipe.network]
    for own in branches.values():
        other = own.network if isinstance(own, TextToImage) else getattr(own, "model", None)
        networks += [other] if other is not None else []
    return networks


def _positions(network: Any) -> int:
    """How many tokens of an image one row of one step holds."""
    if isinstance(network, TokenTransformer) or getattr(network, "order", "") == "causal":
        return 1
    return int(network.config.grid**2 // getattr(network.config, "patch", 1) ** 2)


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


def _on_its_way(pipe: TextToImage, study: Study, task: Task, job: _Job) -> Image.Image:
    """The first images at several moments: a row an image."""
    count = min(ON_THEIR_WAY, len(task.prompts))
    steps = pipe.num_steps(job.variant.sampler.get("steps"))
    moments = {round(i * (steps - 1) / (MOMENTS - 1)) for i in range(MOMENTS)}
    seen: list[Tensor] = []

    def look(step: Step) -> None:
        if step.index in moments:
            seen.append(pipe.preview(step))

    pipe.sample(
        task.prompts[:count],
        seeds=range(study.seed, study.seed + count),
        callback=look,
        **job.options,
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


# what may differ where a study goes on: other cells of the same images
AXES = ("families", "scales", "variants")
HOW = ("scale", "mitigations", "sampler", "branches")  # of a variant


def _settings(
    study: Study,
    task: Task,
    pipes: Mapping[str, TextToImage],
    left_out: list[dict[str, str]],
    processes: int,
) -> dict[str, Any]:
    """What ``study.json`` says."""
    own: dict[str, Any] = json.loads(json.dumps(asdict(study) | {"families": list(pipes)}))
    return {
        "format_version": FORMAT_VERSION,
        "study": own,
        "families": list(pipes),
        "scales": own["scales"],
        "variants": {variant["name"]: variant for variant in own["variants"]},
        "left_out": left_out,
        "prompts": list(task.prompts),
        "open_prompts": list(task.open_prompts),
        "captions": len(set(task.prompts)),
        "n": study.n,
        "weights": study.weights,
        "families_settings": {family: settings_of(pipe) for family, pipe in pipes.items()},
        "versions": versions(),
        "machine": {"processes": processes, "threads": torch.get_num_threads()},
        "date": f"{datetime.now():%Y-%m-%d}",
    }


def _fitting(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings for ``study.json``: these in a new folder; where it holds this study, its grid grows by what is new.

    Raises:
        ValueError: if it holds another study, or something else.
    """
    file = out / "study.json"
    if file.is_file():
        return _merged(read_settings(file), settings, out)
    # hidden files are what a process that was killed has left
    if out.exists() and (not out.is_dir() or any(own.name[0] != "." for own in out.iterdir())):
        raise ValueError(f"{out} is there and holds no study: expected a new or an empty folder")
    return settings


def _merged(held: dict[str, Any], new: dict[str, Any], out: Path) -> dict[str, Any]:
    """The new settings with the families, scales and variants of both.

    Raises:
        ValueError: if they differ in anything else.
    """
    before, now = held["study"], new["study"]
    # studies that were written before a variant could say how to sample, or had branches
    earlier = {
        name: {"sampler": {}, "branches": {}} | own for name, own in held["variants"].items()
    }
    held = held | {"variants": earlier}
    other = [
        f"{name} ({before.get(name)!r} there, {value!r} here)"
        for name, value in now.items()
        if name not in AXES and before.get(name) != value
    ]
    both = held["variants"] | new["variants"]
    other += [
        f"the variant {name!r}"
        for name, own in held["variants"].items()
        if any(both[name][key] != own.get(key) for key in HOW)
    ]
    if other:
        raise ValueError(
            f"{out} holds another study, which differs in {', '.join(other)}: expected another folder"
        )
    for name, own in held["variants"].items():
        if name in new["variants"]:  # () is all scales
            of_both = [own["scales"], new["variants"][name]["scales"]]
            scales = sorted({*of_both[0], *of_both[1]}) if all(of_both) else []
            both[name] = own | {"scales": scales}
    families = list(dict.fromkeys([*held["families"], *new["families"]]))
    scales = sorted({*held["scales"], *new["scales"]})
    grid = {"families": families, "scales": scales}
    left_out = [*held.get("left_out", []), *new["left_out"]]
    return new | {
        **grid,
        "variants": both,
        "study": now | grid | {"variants": list(both.values())},
        "families_settings": held["families_settings"] | new["families_settings"],
        "sources": held.get("sources", {}) | new.get("sources", {}),
        "branches": held.get("branches", {}) | new.get("branches", {}),
        "left_out": [own for i, own in enumerate(left_out) if own not in left_out[:i]],
    }


# what a cell's numbers depend on, beside the versions of the library and of torch
MEASURED_BY = (
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


def _source(features: Features) -> str:
    """The code of the user's own features; "" where there is none to be had."""
    with suppress(OSError, TypeError):
        return inspect.getsource(inspect.getmodule(features) or features)
    return ""


def _digest(images: Tensor | None) -> str:
    return "" if images is None else hashlib.sha256(images.numpy().tobytes()).hexdigest()


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
