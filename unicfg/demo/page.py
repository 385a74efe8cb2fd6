"""The page of ``unicfg demo``, in gradio: settings, a card for each family, the call as code, and earlier drawings."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

from models import TextToImage
from models.folders import held_families
from unicfg.demo import cards
from unicfg.demo.drawing import (
    MOST_IMAGES,
    MOST_SEED,
    PROMPT_LENGTH,
    Frame,
    Request,
    code,
    draw,
    end,
)

try:
    import gradio as gr
    from starlette.middleware import Middleware

    from unicfg.demo.gate import Audience, Gate, page_names
except ModuleNotFoundError as error:
    raise ImportError(
        "unicfg demo needs gradio, which is not installed: pip install 'unicfg[demo]'",
        name=error.name,
    ) from error

WAITING = 64  # drawings in the queue, over all visitors; one at a time is made
GRACE = 5.0  # seconds in which a visitor whose turn has come begins to listen; all others wait
SESSIONS = 200  # visitors whose earlier drawings are kept
EARLIER = 12  # drawings that a visitor can go back to
SLIDER = (-5.0, 20.0)  # of s; beyond it there is little left to see
EXAMPLES: Mapping[str, Sequence[str]] = {
    "shapes": (
        "a large red circle on a white background",
        "a small yellow star on a black background",
        "a small red circle above a large blue square on a grey background",
        "a square and a circle",
        "something green",
    ),
    "emoji": ("tiger in 3d style", "pizza in google style", "hamburger in 3d style"),
}
LOGITS_MITIGATIONS = (
    "kl_trust_region(0.3)",
    "temperature_matching",
    "project_logits",
    "kl_scale",
    "plausibility(0.1)",
    "top_k_of_cond(20)",
)
DENOISERS_MITIGATIONS = (
    "tcfg + mimic_scale(3)",
    "rescale(0.7)",
    "apg(0, momentum=-0.5)",
    "norm_clamp",
    "dynamic_threshold",
    "cfg_zero_star + zero_init",
    "magnitude_aware",
)
HEAD = (
    "<header><h1>unicfg</h1><p>One prompt, several kinds of image model, one line of guidance: "
    "<code>out = uncond_out + s * (cond_out - uncond_out)</code>. At s = 1 a model does what it has learned; "
    "beyond, what the prompt is responsible for is exaggerated. Move s and look.</p></header>"
)
Updates = dict[Any, Any]  # component -> its new value


@dataclass(frozen=True)
class Controls:
    """What a visitor sets.

    Attributes:
        settings: a component for each field of :class:`Request`, in its order.
        beside: whether s = 1 is drawn too.
        draw: the button.
        new_seed: the button.
        examples: prompts to choose from.
    """

    settings: tuple[Any, ...]
    beside: gr.Checkbox
    draw: gr.Button
    new_seed: gr.Button
    examples: gr.Dataset


@dataclass(frozen=True)
class Results:
    """What a visitor is shown.

    Attributes:
        note: how the drawing goes.
        cards: by family.
        family: whose code is shown.
        code: of the drawing.
        strip: earlier drawings, as buttons.
        earlier: the same, as a list of ``cards.Entry``; of one visitor, newest first.
    """

    note: gr.HTML
    cards: Mapping[str, gr.HTML]
    family: gr.Radio
    code: gr.Code
    strip: gr.HTML
    earlier: gr.State

    @property
    def all(self) -> list[Any]:
        """Every component."""
        return [self.note, *self.cards.values(), self.family, self.code, self.strip, self.earlier]


def build(pipes: Mapping[str, TextToImage], weights: str, audience: Audience) -> gr.Blocks:
    """The page, with its queue; :func:`start` serves it.

    Args:
        pipes: by family, in the order of the cards.
        weights: their name, for examples and code.
        audience: who listens; nothing is drawn for nobody.

    Raises:
        ValueError: if there are no pipelines.
    """
    if not pipes:
        raise ValueError("pipes is empty, expected at least one family")
    with gr.Blocks(title="unicfg demo", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(HEAD, elem_classes="plain")
        with gr.Row(elem_id="layout"):  # on narrow screens one below the other
            controls = _controls(pipes, EXAMPLES.get(weights, ()))
            with gr.Column(elem_id="drawing"):
                results = _results(list(pipes))
        _connect(pipes, weights, controls, results, page, audience)
    page.queue(max_size=WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _controls(pipes: Mapping[str, TextToImage], examples: Sequence[str]) -> Controls:
    families = list(pipes)
    tokens = [name for name, pipe in pipes.items() if pipe.space == "logits"]
    others = [name for name in families if name not in tokens]
    with gr.Column(elem_id="main"):
        prompt = gr.Textbox(
            examples[0] if examples else "",
            label="Prompt",
            lines=1,  # else Enter would begin a new one, and not draw
            max_lines=4,
            max_length=PROMPT_LENGTH,
            placeholder="What to draw",
            elem_id="prompt",
        )
        s = gr.Slider(*SLIDER, 3.0, step=0.5, label="Scale of guidance, s", elem_id="s")
        beside = gr.Checkbox(True, label="Draw s = 1 beside it", elem_id="beside")
        with gr.Row():
            button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=90)
            new_seed = gr.Button("New seed", elem_id="new-seed", min_width=90)
    with gr.Column(elem_id="settings"):
        chosen = gr.Dataset(
            components=[prompt],
            samples=[[text] for text in examples],
            label="Examples",
            visible=bool(examples),
            elem_id="examples",
        )
        named = gr.CheckboxGroup(families, value=families, label="Families", elem_id="families")
        count = gr.Slider(1, MOST_IMAGES, 1, step=1, label="Images a family", elem_id="count")
        seed = gr.Number(0, precision=0, minimum=0, maximum=MOST_SEED, label="Seed", elem_id="seed")
        with gr.Accordion("Interval and mitigations", open=False, elem_id="more"):
            gr.Markdown("Guidance acts between two shares of the sampling; outside s is 1.")
            start = gr.Slider(0, 1, 0, step=0.05, label="From", elem_id="start")
            end = gr.Slider(0, 1, 1, step=0.05, label="To", elem_id="end")
            logits = _mitigations(tokens, LOGITS_MITIGATIONS, "logits")
            denoisers = _mitigations(others, DENOISERS_MITIGATIONS, "denoisers")
    settings = (prompt, named, s, start, end, logits, denoisers, seed, count)
    return Controls(settings, beside, button, new_seed, chosen)


def _mitigations(families: Sequence[str], spellings: Sequence[str], name: str) -> gr.Dropdown:
    return gr.Dropdown(
        [("none", ""), *((text, text) for text in spellings)],
        value="",
        label=f"Mitigations for {', '.join(families)}",
        info="choose, or write your own; + joins several",
        allow_custom_value=True,  # they are parsed, never run
        visible=bool(families),
        elem_id=name,
    )


def _results(families: list[str]) -> Results:
    note = gr.HTML(cards.note(""), elem_id="note")
    with gr.Row(elem_classes="cards"):
        shown = {
            family: gr.HTML(cards.card(family, 1, {1.0: None, 3.0: None}), min_width=0)
            for family in families
        }
    with gr.Accordion("The call as Python code", open=False, elem_id="as-code"):
        family = gr.Radio(families, value=families[0], show_label=False, elem_id="code-family")
        lines = gr.Code(
            language="python", interactive=False, show_label=False, buttons=["copy"], elem_id="code"
        )
    gr.HTML("<h2>Earlier drawings</h2>", elem_classes="plain")
    strip = gr.HTML(cards.strip([]), js_on_load=cards.CHOOSE_ENTRY, elem_id="earlier")
    return Results(note, shown, family, lines, strip, gr.State([]))


def _connect(
    pipes: Mapping[str, TextToImage],
    weights: str,
    controls: Controls,
    results: Results,
    page: gr.Blocks,
    audience: Audience,
) -> None:
    """What happens when."""
    prompt, families, s, start, end, logits, denoisers, seed, count = controls.settings
    drawing: dict[str, Any] = {
        "fn": _drawer(pipes, weights, results, audience),
        "inputs": [*controls.settings, controls.beside, results.family, results.earlier],
        "outputs": results.all,
        "preprocess": False,  # Request.check refuses values of any type in a sentence, gradio does not
        "show_progress": "minimal",
        "show_progress_on": [results.note],
        "trigger_mode": "always_last",
        "concurrency_id": "drawing",
        "concurrency_limit": 1,
        "api_visibility": "private",
    }
    at_once: dict[str, Any] = {
        "queue": False,
        "show_progress": "hidden",
        "api_visibility": "private",
    }
    at_first = [page.load] if EXAMPLES.get(weights) else []  # else there is no prompt yet
    gr.on(
        [
            *at_first,
            controls.draw.click,
            prompt.submit,
            seed.submit,
            *(slider.release for slider in (s, start, end, count)),
            *(field.input for field in (families, logits, denoisers, controls.beside)),
        ],
        **drawing,
    )
    controls.new_seed.click(lambda: secrets.randbelow(1_000_000), None, seed, **at_once).then(
        **drawing
    )
    controls.examples.click(_first, controls.examples, prompt, **at_once).then(**drawing)
    results.strip.select(_settings_of, results.earlier, list(controls.settings), **at_once).then(
        **drawing
    )
    spoken = _speaker(pipes, weights)
    results.family.input(spoken, [results.family, results.earlier], results.code, **at_once)


def _first(row: Sequence[str]) -> str:
    return row[0]


def _drawer(
    pipes: Mapping[str, TextToImage], weights: str, results: Results, audience: Audience
) -> Callable[..., Iterator[Updates]]:
    """The function that draws what the controls say."""

    def show(visit: gr.Request, *values: Any) -> Iterator[Updates]:
        *settings, beside, family, earlier = values
        session = visit.session_hash
        try:
            request = _request(settings, list(pipes))
            scales = [1.0, request.s] if beside and request.s != 1 else [request.s]
            # what was asked for comes first, what it is compared with after all of it
            drawings = [(s, draw(pipes, replace(request, s=s))) for s in reversed(scales)]
        except ValueError as error:
            yield {results.note: cards.refusal(str(error))}
            return
        began = time.perf_counter()
        shown: dict[str, dict[float, Frame | None]] = {
            name: dict.fromkeys(scales) for name in request.families
        }
        yield _blank(request, scales, results)
        if not audience.await_listener(session, GRACE):
            yield {results.note: cards.refusal("Nobody listened, so nothing is drawn: ask again.")}
            return
        for s, frames in drawings:
            with closing(frames):
                for frame in frames:
                    if not audience.listens(session):
                        # else the pictures would wait for nobody in memory
                        slow = "The connection was too slow, so the drawing has ended: ask again."
                        yield {results.note: cards.refusal(slow)}
                        return
                    shown[frame.family][s] = frame
                    fresh = cards.card(frame.family, request.count, shown[frame.family])
                    yield {
                        results.cards[frame.family]: fresh,
                        results.note: cards.note(f"drawing {frame.family} at s = {s:g}"),
                    }
        drawn = {name: columns[request.s] for name, columns in shown.items()}
        pictures = [frame.images[0] for frame in drawn.values() if frame and frame.images]
        entry = cards.Entry(request, tuple(pictures))
        others = [own for own in earlier if own.request != request]
        earlier = [entry, *others][:EARLIER]
        family = family if family in request.families else request.families[0]
        seconds = time.perf_counter() - began
        yield {
            results.note: cards.note(f"drawn in {seconds:.1f} s"),
            results.family: family,
            results.code: code(request, weights, pipes[family]),
            results.strip: cards.strip(earlier),
            results.earlier: earlier,
        }

    return show


def _request(settings: Sequence[Any], families: Sequence[str]) -> Request:
    """The request of the controls' values; families in the order of the page, and an empty dropdown is no mitigation.

    The values may be of any type, and are handed on as they are if it is a wrong one.
    """
    prompt, chosen, s, start, end, logits, denoisers, seed, count = settings
    text = prompt.strip() if isinstance(prompt, str) else prompt
    named = chosen
    if isinstance(chosen, list):
        unknown = [family for family in chosen if family not in families]
        named = (*(family for family in families if family in chosen), *unknown)
    logits, denoisers = ("" if own is None else own for own in (logits, denoisers))
    return Request(text, named, s, start, end, logits, denoisers, seed, count)


def _blank(request: Request, scales: Sequence[float], results: Results) -> Updates:
    """A new drawing begins: empty cards of its families, and none of the others."""
    updates: Updates = {results.note: cards.note("drawing")}
    for family, own in results.cards.items():
        empty = cards.card(family, request.count, dict.fromkeys(scales))
        updates[own] = gr.HTML(empty, visible=family in request.families)
    return updates


def _settings_of(earlier: Sequence[cards.Entry], event: gr.EventData) -> list[Any]:
    """The controls' values of an earlier drawing, the one whose button was clicked."""
    number = event.index
    if not isinstance(number, int) or not 0 <= number < len(earlier):
        return [gr.skip()] * len(fields(Request))
    values = list(astuple(earlier[number].request))
    values[1] = list(values[1])
    return values


def _speaker(
    pipes: Mapping[str, TextToImage], weights: str
) -> Callable[[str, Sequence[cards.Entry]], Any]:
    """The function that gives a family's code for the newest drawing."""

    def speak(family: str, earlier: Sequence[cards.Entry]) -> Any:
        if not earlier:
            return gr.skip()
        request = earlier[0].request
        if family not in request.families:
            return f"# the newest drawing is without {family}\n"
        return code(request, weights, pipes[family])

    return speak


def start(
    page: gr.Blocks, audience: Audience, host: str, port: int, names: Sequence[str] = ()
) -> str:
    """Serve a page from a thread, to whoever can reach ``host``.

    It serves no files, and tells visitors nothing of errors inside; these go to the log.

    Args:
        page: from :func:`build`; its ``close()`` ends the service.
        audience: that the page was built with.
        host: "127.0.0.1" for this machine only, "0.0.0.0" for everyone. A page for this machine only is also refused
            to browsers that another site's name has led here, and every page to those that another site's page has.
        port: of the address.
        names: hosts as which a proxy or a tunnel reaches the page; with them it answers as these and this machine alone.

    Returns:
        the address.

    Raises:
        ValueError: if a name is not that of a host.
        OSError: if the port is taken.
    """
    inputs = {number: len(function.inputs) for number, function in page.fns.items()}
    gate = Middleware(Gate, inputs=inputs, audience=audience, names=page_names(host, names))
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        show_error=False,
        footer_links=[],
        run_history=False,
        allowed_paths=[],
        blocked_paths=[Path.cwd().anchor],
        max_file_size=1,
        state_session_capacity=SESSIONS,
        app_kwargs={"middleware": [gate]},
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        pwa=False,
        theme=_theme(),
        css=cards.CSS,
    )
    return address


def _theme() -> gr.themes.Base:
    """In the fonts that a visitor's machine has: nothing is fetched from elsewhere."""
    return gr.themes.Soft(
        primary_hue="indigo",
        radius_size="md",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )


def launch(
    weights: str = "shapes",
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    families: Sequence[str] | None = None,
    names: Sequence[str] = (),
) -> None:
    """Load the weights and serve the page until it is interrupted.

    Args:
        weights: that ship with the library, a folder, or a hub repository.
        host: see :func:`start`.
        port: of the address.
        families: to offer; None is all that the weights hold.
        names: see :func:`start`.

    Raises:
        FileNotFoundError: if there are no such weights.
        ValueError: if they do not hold a family, one is named twice, or a name is not that of a host.
        OSError: if the port is taken.
    """
    offered = held_families(weights) if families is None else families
    if len(offered) == 0 or len(set(offered)) != len(offered):
        raise ValueError(f"families is {list(offered)}, expected at least one, and none twice")
    pipes = {family: TextToImage.from_pretrained(weights, family) for family in offered}
    audience = Audience()
    page = build(pipes, weights, audience)
    print(f"the page is at {start(page, audience, host, port, names)}")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
        end()
