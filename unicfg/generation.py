"""Many images as files of their own: every prompt at every scale from every seed, by any number of processes.

settings.json                             all it takes to make the images again
metadata.jsonl                            a line an image: file_name, text, family, scale, seed; written last
s03/000004-ALargeRedCircle-seed000017.png one image: its scale, the number of its prompt in settings.json, its seed

``metadata.jsonl`` is the imagefolder convention of datasets, which :func:`unicfg.training.data.read_folder` reads too.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, Unpack

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from models import TextToImage
from models.pipeline import SILENT, Options
from tokenizers_vq.files import (
    FORMAT_VERSION,
    check_format_version,
    read_json,
    replace_whole,
    shortened,
    write_text_atomically,
)
from tokenizers_vq.images import to_images
from unicfg.evaluation.provenance import settings_of, versions
from unicfg.evaluation.results import finite_number, scale_text
from unicfg.guidance import Guidance
from unicfg.processes import all_alive, join_processes, wait_for_all

BATCH = 64  # images drawn at once
MOST_SETTINGS_BYTES = 1 << 28  # millions of prompts
SETTINGS, METADATA = "settings.json", "metadata.jsonl"
# the last chunk of every PNG file: its length, its name, its checksum
PNG_END = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# what may differ where images are added to a folder; all else is what they were made with
GROWING = {"prompts": list, "scales": list, "n": int, "guidance": dict, "commands": list}
OF_THE_RUN = ("format_version", "machine")
TOLD = 4  # differences that an error names before it only counts
T = TypeVar("T")


def draw_folder(
    pipe: TextToImage,
    prompts: Sequence[str],
    out: Path | str,
    *,
    n: int,
    seed: int = 0,
    scales: Sequence[float] = (3.0,),
    guidance: Callable[[float], Guidance] = Guidance,
    branches: Mapping[str, str] | None = None,
    command: str = "",
    progress: bool = True,
    **options: Unpack[Options],
) -> int:
    """Draw every image of every prompt, scale and seed into a file of its own, unless it is there.

    A run that was stopped goes on where it was: images that are whole are kept. The same settings with more prompts,
    more scales or a larger ``n`` add to what is there. Started by ``torchrun`` or ``accelerate launch``, the processes
    share the images, each on its device; the files are the same, whatever the number of processes. One run at a time may
    draw into a folder.

    Args:
        pipe: what draws; it is moved to the GPU of the process, if there is one.
        prompts: texts, none twice.
        out: the folder; made if need be.
        n: images of each prompt at each scale.
        seed: of the first image; the next has seed + 1.
        scales: s, none twice.
        guidance: from a scale to what guides; its ``repr`` goes into the settings.
        branches: texts for the branches that guidance names beside "cond" and "uncond".
        command: by which it can be repeated, for the settings.
        progress: show a progress bar, in the first process.
        options: of the family's sampler, as ``pipe`` takes them; images and masks are told apart by a hash.

    Returns:
        how many images ``metadata.jsonl`` lists: those asked for, and those that were there before.

    Raises:
        ValueError: if a value is out of its range or comes twice, the folder holds images of other settings (names what
            differs) or something else, or an option is none of the family's or cannot be written down.
        TypeError: if there is no such option.
        FloatingPointError: if images are not finite.
        OSError: if something cannot be written, or another process of the run has ended; what is finished stays.

    Example:
        >>> pipe = TextToImage.from_pretrained("shapes", family="flow")
        >>> draw_folder(pipe, ["a red circle", "a blue square"], "images", n=1000, scales=[1.0, 3.0])
        4000
    """
    state, out = join_processes(), Path(out)
    scales = sorted(map(float, scales))
    _check(prompts, n, seed, scales)
    ways = {scale: guidance(scale) for scale in scales}
    settings = _settings(pipe, prompts, ways, n, seed, branches or {}, options, command, state)
    if state.device.type == "cuda":
        pipe.to(state.device)

    def begin() -> tuple[dict[str, int], dict[int, int]]:
        """The number of every prompt, and how many images are missing in each batch that lacks some."""
        both = _fitting(out, settings)
        _sweep(out)
        text = json.dumps(both, indent=1) + "\n"
        if len(text) > MOST_SETTINGS_BYTES:  # the text is ASCII
            raise ValueError(
                f"prompts are {len(both['prompts'])}, of {len(text)} bytes in {SETTINGS}, expected at most "
                f"{MOST_SETTINGS_BYTES}: draw them into several folders"
            )
        write_text_atomically(text, out / SETTINGS)
        numbers = {text: number for number, text in enumerate(both["prompts"])}
        numbers = {text: numbers[text] for text in sorted(prompts, key=numbers.__getitem__)}
        missing = {
            index: count
            for index, batch in enumerate(_Grid(numbers, tuple(ways), seed, n).batches())
            if (count := sum(not is_whole(out / own.file) for own in batch))
        }
        return numbers, missing

    numbers, missing = _of_the_first(state, begin)
    # what is finished is not shared out, or a process might have nothing to do; large batches go first, in turns
    by_size = sorted(missing.items(), key=lambda own: -own[1])
    ours = dict(by_size[state.process_index :: state.num_processes])
    grid = _Grid(numbers, tuple(ways), seed, n)
    with tqdm(
        total=sum(ours.values()),
        desc=f"drawing, one of {state.num_processes}" if state.num_processes > 1 else "drawing",
        unit="image",
        disable=not (progress and ours and state.is_main_process),
    ) as bar:
        for index, batch in enumerate(grid.batches()):
            if index not in ours:
                continue
            images = pipe.sample(
                [own.text for own in batch],
                seeds=[own.seed for own in batch],
                guidance=ways[batch[0].scale],
                branches=branches,
                batch_size=BATCH,
                **options,
            ).cpu()
            for own, image in zip(batch, to_images(images), strict=True):
                if not is_whole(out / own.file):
                    _save(image, out / own.file)
            bar.update(ours[index])
    return _of_the_first(state, lambda: _write_metadata(out, pipe.family, grid))


class _Picture(NamedTuple):
    """One image to draw; ``number`` is that of its prompt."""

    number: int
    text: str
    scale: float
    seed: int

    @property
    def file(self) -> str:
        """Its name in the folder: another for every image, in the order of scale, prompt and seed."""
        whole, point, rest = scale_text(self.scale).partition(".")
        # without separators: datasets takes a word like "test" between them for the name of a split
        words = (word[0].upper() + word[1:] for word in re.findall("[A-Za-z0-9]+", self.text))
        slug = "".join(words)[:40]
        name = f"{self.number:06d}-{slug}-" if slug else f"{self.number:06d}-"
        return f"s{whole.zfill(2)}{point}{rest}/{name}seed{self.seed:06d}.png"


@dataclass(frozen=True)
class _Grid:
    """Every prompt at every scale from every seed.

    Attributes:
        numbers: of the prompts, by text, ascending.
        scales: ascending.
        seed: the first.
        n: seeds.
    """

    numbers: Mapping[str, int]
    scales: tuple[float, ...]
    seed: int
    n: int

    def __contains__(self, own: _Picture) -> bool:
        """Whether it is one of these."""
        inside = self.seed <= own.seed < self.seed + self.n
        return inside and own.scale in self.scales and own.text in self.numbers

    def __iter__(self) -> Iterator[_Picture]:
        """In the order of their names."""
        for scale in self.scales:
            for text, number in self.numbers.items():
                for seed in range(self.seed, self.seed + self.n):
                    yield _Picture(number, text, scale, seed)

    def batches(self) -> Iterator[list[_Picture]]:
        """Images that are drawn at once, always the same ones: in another company floats may round otherwise.

        Batches hold one scale and at most ``BATCH`` prompts, all of them from one seed before the next, so that more
        seeds or further prompts leave most batches as they were.
        """
        prompts = list(self.numbers.items())
        for scale in self.scales:
            for start in range(0, len(prompts), BATCH):
                group = prompts[start : start + BATCH]
                count = len(group) * self.n
                for first in range(0, count, BATCH):
                    places = (
                        divmod(i, len(group)) for i in range(first, min(first + BATCH, count))
                    )
                    yield [_Picture(*group[j][::-1], scale, self.seed + i) for i, j in places]


def is_whole(file: Path) -> bool:
    """Whether a PNG file is there to its end; a look at its last bytes, not at its pixels."""
    try:
        with open(file, "rb") as handle:
            handle.seek(-len(PNG_END), os.SEEK_END)
            return handle.read() == PNG_END
    except OSError:  # not there, or shorter than that
        return False


def _save(image: Image.Image, file: Path) -> None:
    """Write an image as PNG, whole or not at all.

    It is not forced to the disk, which would take longer than to draw a small image: what a power cut leaves of it is
    seen by :func:`is_whole`.
    """
    with _can_go_on():
        replace_whole(file, lambda beside: image.save(beside, "PNG"), to_disk=False)


@contextmanager
def _can_go_on() -> Iterator[None]:
    """Say what it means that a file cannot be written.

    Raises:
        OSError: if so.
    """
    try:
        yield
    except OSError as error:
        raise OSError(
            f"{error}; what is finished stays, and the same run again goes on from there"
        ) from error


def _sweep(out: Path) -> None:
    """Remove what a killed run was just writing."""
    for pattern in (".*.tmp", "s*/.*.tmp"):
        for leftover in out.glob(pattern):
            leftover.unlink(missing_ok=True)


def _of_the_first(state: PartialState, work: Callable[[], T]) -> T:
    """What ``work`` gives in the first process when all have come so far, in all of them; they share its error too."""
    wait_for_all(state)
    outcome: list[Any] = [None]
    if state.is_main_process:
        try:
            outcome = [work()]
        except (OSError, ValueError) as error:
            outcome = [error]
    with all_alive():
        (result,) = broadcast_object_list(outcome)
    if isinstance(result, Exception):
        raise result
    found: T = result
    return found


def _write_metadata(out: Path, family: str, asked: _Grid) -> int:
    """Write ``metadata.jsonl`` of all images of the folder's grid that are there, in order; returns their number.

    Raises:
        OSError: if it cannot be written, or an image that was drawn is gone.
    """
    held = _read_settings(out / SETTINGS)
    numbers = {text: number for number, text in enumerate(held["prompts"])}
    count = 0

    def write(beside: Path) -> None:
        nonlocal count
        with open(beside, "w", encoding="utf-8") as file:
            for own in _Grid(numbers, tuple(held["scales"]), held["seed"], held["n"]):
                if not is_whole(out / own.file):
                    if own in asked:
                        raise OSError(f"{own.file} is gone since it was drawn")
                    continue
                line = {"file_name": own.file, "text": own.text, "family": family}
                file.write(json.dumps(line | {"scale": own.scale, "seed": own.seed}) + "\n")
                count += 1

    with _can_go_on():
        replace_whole(out / METADATA, write)
    return count


def _check(prompts: Sequence[Any], n: Any, seed: Any, scales: Sequence[Any]) -> None:
    """Refuse what makes no grid.

    Raises:
        ValueError: if so; names the argument.
    """
    if isinstance(prompts, str):
        raise ValueError(f"prompts is {prompts!r}, expected a list of strings")
    for name, values in (("prompts", prompts), ("scales", scales)):
        if len(values) == 0:
            raise ValueError(f"{name} is empty, expected at least one")
        seen: set[Any] = set()
        for value in values:
            if name == "scales":
                finite_number(value, "one of scales")
            elif not isinstance(value, str):
                raise ValueError(f"prompts holds {value!r:.100}, expected texts")
            if value in seen:
                raise ValueError(f"{name} holds {value!r:.100} twice, expected each once")
            seen.add(value)
    for name, value, least, most in (("n", n, 1, 2**62), ("seed", seed, -(2**62), 2**62)):
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise ValueError(f"{name} is {value!r:.100}, expected an int from {least} to {most}")


def _settings(
    pipe: TextToImage,
    prompts: Sequence[str],
    ways: Mapping[float, Guidance],
    n: int,
    seed: int,
    branches: Mapping[str, str],
    options: Mapping[str, Any],
    command: str,
    state: PartialState,
) -> dict[str, Any]:
    """What ``settings.json`` says of this run alone."""
    given = {
        name: _recorded(name, value)
        for name, value in options.items()
        if value is not None and not (name in SILENT and value == SILENT[name])
    }
    own = settings_of(pipe)
    device = own.pop("device")
    settings = {
        "format_version": FORMAT_VERSION,
        "family": pipe.family,
        "seed": seed,
        "branches": dict(branches),
        **own,
        "sampler": own["sampler"] | given,
        "versions": versions(),
        "prompts": list(prompts),
        "scales": list(ways),
        "n": n,
        "guidance": {scale_text(scale): repr(way) for scale, way in ways.items()},
        "commands": [command] if command else [],
        "machine": {
            "processes": state.num_processes,
            "threads": torch.get_num_threads(),
            "device": device,
        },
    }
    as_read: dict[str, Any] = json.loads(json.dumps(settings))
    return as_read


def _recorded(name: str, value: object) -> object:
    """An option as JSON has it; an image or a mask is its hash.

    Raises:
        ValueError: if it can be neither.
    """
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Image.Image):
        return hashlib.sha256(repr((value.mode, value.size)).encode() + value.tobytes()).hexdigest()
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        what = repr((held.dtype, tuple(held.shape))).encode()
        return hashlib.sha256(what + held.numpy().tobytes()).hexdigest()
    raise ValueError(
        f"{name} is a {type(value).__name__}, expected what can be written into {SETTINGS}"
    )


def _read_settings(file: Path) -> dict[str, Any]:
    """What ``settings.json`` holds.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is another file of this name, is damaged, or was written by another release.
    """
    try:
        held = read_json(file, MOST_SETTINGS_BYTES)
        check_format_version(held)
        for name, kind in GROWING.items():
            if not isinstance(held.get(name), kind):
                raise ValueError(f"{name} is {held.get(name)!r:.100}, expected a {kind.__name__}")
        for name, texts in (
            ("guidance", held["guidance"].values()),
            ("commands", held["commands"]),
        ):
            if not all(isinstance(own, str) for own in texts):
                raise ValueError(f"{name} is {held[name]!r:.100}, expected texts in it")
        _check(held["prompts"], held["n"], held.get("seed"), held["scales"])
    except ValueError as error:
        raise ValueError(
            f"{file} is not the settings of drawn images ({shortened(error)}): expected another folder"
        ) from error
    return held


def _fitting(out: Path, new: dict[str, Any]) -> dict[str, Any]:
    """The settings for the folder: the new ones; where images of the same settings are there, those of both.

    Raises:
        ValueError: if it holds images of other settings, or something else.
    """
    file = out / SETTINGS
    if not file.is_file():
        # a hidden file may be what a killed run was just writing
        if out.exists() and (not out.is_dir() or any(p.name[0] != "." for p in out.iterdir())):
            raise ValueError(
                f"{out} is there and holds no drawn images: expected a new or an empty folder"
            )
        return new
    held = _read_settings(file)
    before, now = (
        _flat({k: v for k, v in own.items() if k not in (*GROWING, *OF_THE_RUN)} | {"guidance": g})
        for own, g in (
            (held, {s: g for s, g in held["guidance"].items() if s in new["guidance"]}),
            (new, {s: g for s, g in new["guidance"].items() if s in held["guidance"]}),
        )
    )
    differ = [name for name in now | before if now.get(name) != before.get(name)]
    if not differ:
        known = set(held["prompts"])
        return new | {
            "prompts": held["prompts"] + [text for text in new["prompts"] if text not in known],
            "scales": sorted({*held["scales"], *new["scales"]}),
            "n": max(held["n"], new["n"]),
            "guidance": held["guidance"] | new["guidance"],
            "commands": list(dict.fromkeys(held["commands"] + new["commands"])),
        }
    if not any(out.glob("s*/*.png")):  # a run that was refused by the sampler, say
        return new
    shown = [
        f"{name:.80} ({_short(before.get(name))} there, {_short(now.get(name))} here)"
        for name in differ[:TOLD]
    ]
    more = f" and {len(differ) - TOLD} more" if len(differ) > TOLD else ""
    raise ValueError(
        f"{out} holds images of other settings, which differ in {', '.join(shown)}{more}: expected another folder"
    )


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Values by their names, those of objects in objects as "sampler.steps"."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{before}{name}.")
        else:
            flat[before + name] = value
    return flat


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
