"""What a visitor asks for, and its pictures as they are made. Nothing here knows of the page that shows them."""

from __future__ import annotations

import json
import logging
import queue
import reprlib
import threading
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from models import TextToImage
from tokenizers_vq.images import to_images
from unicfg.guidance import Guidance
from unicfg.guidance.spelling import as_python, read_guidance

log = logging.getLogger(__name__)

PROMPT_LENGTH = 300  # characters
MITIGATIONS_LENGTH = 200  # characters
MOST_IMAGES = 4  # a family
LEAST_S, MOST_S = -20.0, 50.0
MOST_SEED = 2**32 - 1
PREVIEWS = 8  # pictures a family at most, the finished one included


@dataclass(frozen=True)
class Request:
    """What a visitor asks for.

    Attributes:
        prompt: the text.
        families: to draw with, one after another.
        s: the scale.
        start: progress, in [0, 1], where guidance begins; before it the scale is 1.
        end: progress, in [start, 1], where it stops.
        logits: mitigations of pipelines that guide logits, as :func:`unicfg.guidance.spelling.read_mitigations` reads
            them.
        denoisers: mitigations of all others.
        seed: of the first image; the next has seed + 1.
        count: images a family.
    """

    prompt: str
    families: tuple[str, ...]
    s: float = 3.0
    start: float = 0.0
    end: float = 1.0
    logits: str = ""
    denoisers: str = ""
    seed: int = 0
    count: int = 1

    @property
    def scale(self) -> str:
        """The scale as text, in which s stands for :attr:`s`."""
        return "s" if (self.start, self.end) == (0, 1) else f"interval(s, {self.start}, {self.end})"

    @property
    def seeds(self) -> list[int]:
        """One an image."""
        return list(range(self.seed, self.seed + self.count))

    def mitigations(self, space: str) -> str:
        """The mitigations of a pipeline that guides in a space, see :attr:`TextToImage.space`, as text."""
        return self.logits if space == "logits" else self.denoisers

    def guidance(self, space: str) -> Guidance:
        """The guidance of a pipeline that guides in a space.

        Raises:
            ValueError: if its text cannot be read, or a mitigation is not meant for the space.
        """
        guidance = read_guidance(self.scale, self.s, self.mitigations(space))
        guidance.begin(space)
        return guidance

    def check(self) -> None:
        """Refuse what is not to be drawn, whoever draws it; :func:`draw` also asks whether the guidance can be read.

        Values of any type are refused like this, since anybody can post anything to the page.

        Raises:
            ValueError: if so; says in a sentence for the visitor what is wrong.
        """
        _check_text("The prompt", self.prompt)
        if not self.prompt.strip():
            raise ValueError("The prompt is empty: write what to draw.")
        if len(self.prompt) > PROMPT_LENGTH:
            raise ValueError(
                f"The prompt has {len(self.prompt)} characters, expected at most {PROMPT_LENGTH}."
            )
        if any("\ud800" <= letter <= "\udfff" for letter in self.prompt):
            raise ValueError("The prompt holds half a character, which is no text.")
        if not _is_names(self.families):
            raise ValueError(
                f"The families are {reprlib.repr(self.families)}, expected a tuple of names."
            )
        if not self.families or len(set(self.families)) != len(self.families):
            chosen = ", ".join(self.families) or "none"
            raise ValueError(f"The families are {chosen}: expected at least one, and none twice.")
        _check_number("s", self.s, LEAST_S, MOST_S)
        _check_number("The start of the interval", self.start, 0, 1)
        _check_number("The end of the interval", self.end, 0, 1)
        if self.start > self.end:
            raise ValueError(
                f"The interval starts at {self.start:g} and ends at {self.end:g}: expected the start first."
            )
        _check_whole("The seed", self.seed, 0, MOST_SEED)
        _check_whole("The number of images", self.count, 1, MOST_IMAGES)
        for text in (self.logits, self.denoisers):
            _check_text("The text of the mitigations", text)
            if len(text) > MITIGATIONS_LENGTH:
                raise ValueError(
                    f"The mitigations have {len(text)} characters, expected at most {MITIGATIONS_LENGTH}."
                )


def _is_names(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(name, str) for name in value)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name} is {reprlib.repr(value)}, expected text.")


def _check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        shown = reprlib.repr(value)
        raise ValueError(f"{name} is {shown}, expected a number from {least:g} to {most:g}.")


def _check_whole(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        shown = reprlib.repr(value)
        raise ValueError(f"{name} is {shown}, expected a whole number from {least} to {most}.")


@dataclass(frozen=True)
class Frame:
    """What one family has so far.

    Attributes:
        family: which.
        images: one a seed; none where the family failed.
        progress: share of its steps that are done, in (0, 1].
        finished: whether this is its last frame.
        failure: why there are no images, for the visitor; None where there are.
    """

    family: str
    images: tuple[Image.Image, ...]
    progress: float
    finished: bool = False
    failure: str | None = None


def draw(pipes: Mapping[str, TextToImage], request: Request) -> Generator[Frame, None, None]:
    """Draw with one family after another, in a thread of its own, and hand out the pictures as they are made.

    A family that fails gets a frame that says why, and the others go on. A caller who closes the generator, or drops it,
    stops the sampler at its next step.

    Args:
        pipes: by family.
        request: what to draw.

    Returns:
        frames, at most ``PREVIEWS`` a family; the last one of each is finished.

    Raises:
        ValueError: if the request is refused, at once and not at the first frame.
    """
    request.check()
    for family in request.families:
        if family not in pipes:
            raise ValueError(f"The family is {family}, expected one of {', '.join(pipes)}.")
        request.guidance(pipes[family].space)
    return _frames(pipes, request)


# the process is about to end, for all drawings alike: torch crashes where it still computes then
_ending = threading.Event()
DRAWING = "unicfg-demo"  # name of the threads that draw


def end() -> None:
    """Stop all drawings of this process at their next step, wait for them, and begin no other."""
    _ending.set()
    for thread in threading.enumerate():
        if thread.name == DRAWING:
            thread.join()


class _Gone(Exception):
    """Nobody waits for the pictures any more."""


class _Outlet:
    """The way of frames from the sampler's thread to whoever waits for them."""

    def __init__(self) -> None:
        self.frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self.closed = threading.Event()

    def check(self) -> None:
        """Stop the sampler if nobody waits, or the program is about to end.

        Raises:
            _Gone: if so.
        """
        if self.closed.is_set() or _ending.is_set() or not threading.main_thread().is_alive():
            raise _Gone

    def show(self, frame: Frame) -> None:
        """Hand a frame over.

        Raises:
            _Gone: if nobody waits for it.
        """
        self.check()
        self.frames.put(frame)


def _frames(pipes: Mapping[str, TextToImage], request: Request) -> Generator[Frame, None, None]:
    outlet = _Outlet()

    def work() -> None:
        try:
            for family in request.families:
                outlet.check()
                _draw_family(pipes[family], request, outlet)
        except _Gone:
            pass
        finally:
            outlet.frames.put(None)

    # no daemon: torch crashes if the program ends while it computes
    threading.Thread(target=work, name=DRAWING).start()
    try:
        while (frame := outlet.frames.get()) is not None:
            yield frame
    finally:
        outlet.closed.set()  # not joined: whoever closes this may be an event loop


def _draw_family(pipe: TextToImage, request: Request, outlet: _Outlet) -> None:
    """Show what one family draws.

    Raises:
        _Gone: if nobody waits for it.
    """
    family, steps = pipe.family, pipe.num_steps()
    every = -(-steps // PREVIEWS)

    def preview(step: Any) -> None:
        outlet.check()
        done = step.index + 1
        if done % every == 0 and done < steps:
            outlet.show(Frame(family, tuple(to_images(pipe.preview(step))), done / steps))

    try:
        images = pipe(
            [request.prompt] * request.count,
            seeds=request.seeds,
            guidance=request.guidance(pipe.space),
            callback=preview,
        )
    except _Gone:
        raise
    except (FloatingPointError, ValueError) as error:
        outlet.show(Frame(family, (), 1.0, True, str(error)))
    except Exception:  # a visitor gets a sentence whatever happens; the log has the rest
        log.exception("drawing with %s failed", family)
        outlet.show(
            Frame(family, (), 1.0, True, "This could not be drawn: the server's log says why.")
        )
    else:
        outlet.show(Frame(family, tuple(images), 1.0, True))


def code(request: Request, weights: str, pipe: TextToImage) -> str:
    """The call that draws a pipeline's images again, as Python.

    Args:
        request: what was drawn.
        weights: name or folder of the pipelines.
        pipe: which of them.

    Raises:
        ValueError: if the guidance cannot be read.
    """
    times = f" * {request.count}" if request.count > 1 else ""
    guidance = as_python(request.scale, request.s, request.mitigations(pipe.space))
    return (
        f"from models import TextToImage\n{guidance}"
        f"pipe = TextToImage.from_pretrained({_literal(weights)}, family={_literal(pipe.family)})\n"
        f"prompts = [{_literal(request.prompt)}]{times}\n"
        f"images = pipe(prompts, seeds={request.seeds}, guidance=guidance)\n"
    )


def _literal(text: str) -> str:
    """A Python string in double quotes, as the documentation has them; what JSON escapes Python reads back."""
    return json.dumps(text, ensure_ascii=False)
