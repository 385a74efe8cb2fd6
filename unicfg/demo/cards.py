"""The page's own HTML: a card for each family, the strip of earlier drawings, and how they look.

Pictures stand in the text itself, so the server keeps and serves no files.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from PIL import Image

from unicfg.demo.drawing import Frame, Request

SIDE = 256  # pixels of a shown picture at least; small images keep their hard pixels
ABOUT: Mapping[str, str] = {
    "ar": "one token after another; guided are logits",
    "masked": "many tokens at a time; guided are logits",
    "diffusion": "latents out of noise; guided are a denoiser's predictions",
    "flow": "latents along a straight path; guided are velocities",
    "hybrid": "one latent after another; guided are its head's predictions",
}


@dataclass(frozen=True)
class Entry:
    """An earlier drawing.

    Attributes:
        request: what was asked for.
        pictures: the first image of each family that drew one.
    """

    request: Request
    pictures: tuple[Image.Image, ...]


def card(family: str, count: int, columns: Mapping[float, Frame | None]) -> str:
    """One family's pictures, a column a scale, in the order of ``columns``.

    Args:
        family: which.
        count: images in each column.
        columns: what there is by s, None where nothing is drawn yet.
    """
    shown = "".join(_column(family, count, s, frame) for s, frame in columns.items())
    done = sum(frame.progress for frame in columns.values() if frame) / max(1, len(columns))
    return (
        f'<article class="family" data-family="{family}" data-finished="{int(_is_finished(columns))}">'
        f"<h3>{family}</h3><p>{ABOUT.get(family, '')}</p>"
        f'<progress max="1" value="{done:.3f}" aria-label="{family}: share that is drawn"></progress>'
        f'<div class="columns">{shown}</div></article>'
    )


def _is_finished(columns: Mapping[float, Frame | None]) -> bool:
    return all(frame is not None and frame.finished for frame in columns.values())


def _column(family: str, count: int, s: float, frame: Frame | None) -> str:
    caption = f"<figcaption>s = {s:g}</figcaption>"
    if frame is not None and frame.failure is not None:
        return f'<figure><p class="failure">{html.escape(frame.failure)}</p>{caption}</figure>'
    images = frame.images if frame is not None else ()
    shown = "".join(_picture(image, f"{family}, s = {s:g}") for image in images)
    shown += '<span class="empty"></span>' * (count - len(images))
    many = " many" if count > 1 else ""
    return f'<figure><div class="pictures{many}">{shown}</div>{caption}</figure>'


def _picture(image: Image.Image, alt: str) -> str:
    return f'<img alt="{html.escape(alt)}" src="{_data_url(enlarged(image))}">'


def enlarged(image: Image.Image) -> Image.Image:
    """A picture with at least ``SIDE`` pixels a side, each of its own a square of whole pixels."""
    factor = max(1, -(-SIDE // min(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def strip(entries: Sequence[Entry]) -> str:
    """Earlier drawings as buttons that know their number, newest first."""
    if not entries:
        return '<p class="hint">Your drawings are kept here until you close the page; click one to go back to it.</p>'
    return f'<div class="strip">{"".join(map(_button, range(len(entries)), entries))}</div>'


def _button(number: int, entry: Entry) -> str:
    request = entry.request
    pictures = "".join(f'<img alt="" src="{_data_url(image)}">' for image in entry.pictures)
    settings = [f"s = {request.s:g}", f"seed {request.seed}"]
    if request.count > 1:
        settings.append(f"{request.count} images")
    if (request.start, request.end) != (0, 1):
        settings.append(f"from {request.start:g} to {request.end:g}")
    settings += [text for text in (request.logits, request.denoisers) if text]
    return (
        f'<button type="button" data-entry="{number}" title="Bring these settings back">'
        f'<span class="thumbnails">{pictures}</span><b>{html.escape(request.prompt)}</b>'
        f"<span>{html.escape(', '.join(settings))}</span></button>"
    )


def note(text: str) -> str:
    """A line of text on how the drawing goes."""
    return f'<p class="note" role="status">{html.escape(text)}</p>'


def refusal(text: str) -> str:
    """A line of text on why nothing is drawn."""
    return f'<p class="note refused" role="alert">{html.escape(text)}</p>'


# clicks anywhere in the strip -> the number of the button that holds the place
CHOOSE_ENTRY = """
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-entry]");
  if (button) trigger("select", { index: Number(button.dataset.entry) });
});
"""

CSS = """
.gradio-container { max-width: 1400px !important; width: 100%; margin: auto; }
.cards .html-container, .plain .html-container, #note .html-container, #earlier .html-container { padding: 0; }
header h1 { margin: 0; }
header p { margin: 4px 0 0; max-width: 75ch; }
#layout { display: grid; grid-template: auto 1fr / 310px minmax(0, 1fr); gap: 16px; align-items: start; }
#drawing { grid-area: 1 / 2 / 3 / 3; min-width: 0; }
#main { grid-area: 1 / 1; }
#settings { grid-area: 2 / 1; }
@media (max-width: 800px) {
  #layout { grid-template: none / minmax(0, 1fr); }
  #main, #drawing, #settings { grid-area: auto; }
  #drawing { grid-row: 2; }
}
.cards { display: grid !important; grid-template-columns: repeat(auto-fill, minmax(min(240px, 100%), 1fr)); gap: 12px; }
.family { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px;
  background: var(--block-background-fill); height: 100%; }
.family h3 { margin: 0; font-size: 1.05rem; }
.family p { margin: 0 0 8px; opacity: .75; font-size: .8rem; line-height: 1.3; }
.family progress { display: block; width: 100%; height: 4px; border: 0; border-radius: 2px; overflow: hidden;
  margin-bottom: 10px; appearance: none; background: var(--border-color-primary); }
.family progress::-webkit-progress-bar { background: var(--border-color-primary); }
.family progress::-webkit-progress-value { background: var(--color-accent); }
.family progress::-moz-progress-bar { background: var(--color-accent); }
.family[data-finished="1"] progress { visibility: hidden; }
.family .columns { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 10px; }
.family figure { margin: 0; min-width: 0; }
.family figcaption { text-align: center; font-size: .85rem; margin-top: 4px; font-variant-numeric: tabular-nums; }
.family .pictures { display: grid; gap: 4px; }
.family .pictures.many { grid-template-columns: 1fr 1fr; }
.family img, .family .empty { display: block; width: 100%; aspect-ratio: 1; border-radius: 4px; margin: 0;
  image-rendering: pixelated; background: var(--background-fill-secondary);
  box-shadow: 0 0 0 1px var(--border-color-primary); }
.family .failure { color: #b91c1c; opacity: 1; overflow-wrap: anywhere; }
.dark .family .failure { color: #fca5a5; }
/* while a visitor waits, gradio's place in the queue stands where the note stood */
#note .pending { opacity: 0; }
#note .wrap { overflow: visible; align-items: start; background: none; opacity: 1; }
#note .progress-text { position: static; transform: none; padding: 0; background: none; font: inherit; font-size: .9rem; }
.note { margin: 0; min-height: 1.6em; font-size: .9rem; opacity: .75; }
.note.refused { color: #b91c1c; font-weight: 600; opacity: 1; }
.dark .note.refused { color: #fca5a5; }
.hint { opacity: .75; font-size: .85rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 8px; }
.strip button { text-align: left; display: flex; flex-direction: column; gap: 4px; padding: 8px; cursor: pointer;
  border: 1px solid var(--border-color-primary); border-radius: 8px; background: var(--block-background-fill);
  color: var(--body-text-color); font: inherit; font-size: .78rem; overflow-wrap: anywhere; min-width: 0; }
.strip button:hover, .strip button:focus-visible { border-color: var(--color-accent); }
.strip b { display: -webkit-box; -webkit-line-clamp: 2; -webkit-box-orient: vertical; overflow: hidden; }
.strip span { opacity: .75; }
.strip .thumbnails { opacity: 1; display: flex; gap: 3px; }
.strip img { width: 32px; height: 32px; image-rendering: pixelated; border-radius: 2px; margin: 0; }
"""
