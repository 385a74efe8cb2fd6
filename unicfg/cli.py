"""The command line: ``unicfg train RECIPE``, ``unicfg generate PROMPT`` and ``unicfg compare PROMPT``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from tqdm.auto import tqdm

from models import TextToImage
from models.folders import held_families
from models.pipeline import MODEL_CLASSES
from unicfg.evaluation.comparison import compare as draw_comparison
from unicfg.guidance import Guidance, branches
from unicfg.pictures import check_picture_name, grid, save_picture
from unicfg.sampling import TokenFilter

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="One guidance for autoregressive and diffusion token models.",
)
BATCH = 64  # images drawn at once
# ClickException, whether typer takes it from click or from the copy that newer versions bring
ParserError: type[Exception] = typer.BadParameter.__mro__[2]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see examples/recipes.")],
    family: Annotated[
        str | None, typer.Option(help="ar, masked, diffusion, flow or hybrid, not the recipe's.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Train an image tokenizer and a model on captioned images.

    Another family of the same recipe is added to the same folder and takes its tokenizer from there.

    Writes checkpoints, metrics.jsonl and sample grids into the folder that the recipe names as out.
    """
    # imported here: generating must not wait for the training libraries
    from unicfg.training.recipe import load_recipe
    from unicfg.training.trainer import train as run

    settings = load_recipe(recipe, family)
    try:
        run(settings, resume=resume)
    except KeyboardInterrupt:
        print("\ninterrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    command = f"unicfg generate PROMPT --weights {settings.out} --family {settings.model.family}"
    print(f"the pipeline is in {settings.out}: {command}")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A text file with one prompt a line.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Shipped weights (emoji, shapes), a folder, or a hub repository.")
    ] = "emoji",
    family: Annotated[
        str, typer.Option(help="ar, masked, diffusion, flow or hybrid; what the weights hold.")
    ] = "ar",
    scale: Annotated[
        float, typer.Option(help="s: 1 is the conditional model, more is stronger.")
    ] = 3.0,
    scales: Annotated[
        list[float] | None,
        typer.Option(help="Several scales at once, for a grid: --scales 0 1 2 4 8."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images a prompt.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Of the first image; the next has seed + 1.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Of the sampler; for all families but ar.", min=1)
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="diffusion, flow, hybrid: ddim, heun or dpmpp_2m.")
    ] = None,
    reveal: Annotated[
        str | None, typer.Option(help="masked: halton (the default), cosine, linear or arccos.")
    ] = None,
    temperature: Annotated[
        float,
        typer.Option(help="ar, masked: 0 takes the likeliest token; hybrid: of the first noise."),
    ] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Keep this much probability.")] = None,
    guide_at: Annotated[str | None, typer.Option(help="hybrid: head, states or both.")] = None,
    refresh: Annotated[
        int,
        typer.Option(
            help="masked, diffusion, flow: run the other branch every so many steps.", min=1
        ),
    ] = 1,
    compile: Annotated[
        bool,
        typer.Option("--compile", help="ar, hybrid: a compiled step; worth it for many images."),
    ] = False,
    negative: Annotated[
        str | None, typer.Option(help="What to stay away from, besides the null condition.")
    ] = None,
    away: Annotated[float, typer.Option(help="How far from --negative; 0 ignores it.")] = 1.0,
    init_image: Annotated[
        Path | None, typer.Option(help="A picture of which a part is drawn anew.")
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="Which part: a picture, white there.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("out/unicfg.png"),
) -> None:
    """Draw images of a prompt, or a grid of several prompts or scales, into one picture."""
    texts = _prompts(prompt, prompts)
    values = scales or [scale]
    # what is bad is refused before weights are read
    if negative is None and away != 1.0:
        raise ValueError(f"--away is {away} without --negative, expected both or none")
    guidances = [
        Guidance(value if negative is None else branches.negative(value, away)) for value in values
    ]
    TokenFilter(temperature, top_k, top_p)
    check_picture_name(out)
    pipe = TextToImage.from_pretrained(weights, family)
    jobs = [(text, seed + i) for text in texts for i in range(n)]
    known = {
        name: _open_picture(name, file, pipe.tokenizer.config.image_size)
        for name, file in (("init-image", init_image), ("mask", mask))
        if file is not None
    }
    total = len(guidances) * -(-len(jobs) // BATCH) * pipe.num_steps(steps)
    columns: list[list[Image.Image]] = []
    with tqdm(total=total, desc="drawing", unit="step") as bar:

        def advance(step: object) -> None:
            bar.update()

        for guidance in guidances:
            column = pipe(
                [text for text, _ in jobs],
                seeds=[number for _, number in jobs],
                guidance=guidance,
                branches=None if negative is None else {"negative": negative},
                batch_size=BATCH,
                steps=steps,
                solver=solver,
                reveal=reveal,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                guide_at=guide_at,
                refresh=refresh,
                compile=compile,
                init_image=known.get("init-image"),
                mask=known.get("mask"),
                callback=advance,
            )
            columns.append(column)
    picture = _arrange(texts, values, columns, n, seed)
    print(f"the picture is in {save_picture(picture, out)}")


@app.command()
def compare(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    scales: Annotated[
        list[float] | None, typer.Option(help="The columns: --scales 1 2 4 8 16.")
    ] = None,
    families: Annotated[
        list[str] | None, typer.Option(help="The rows; all that the weights hold.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="Shipped weights (shapes), a folder, or a hub repository.")
    ] = "shapes",
    n: Annotated[int, typer.Option("-n", help="Seeds, a row each.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Of the first image; the next has seed + 1.")] = 0,
    out: Annotated[
        Path, typer.Option(help="A picture to write, or a folder for single images and settings.")
    ] = Path("out/compare.png"),
) -> None:
    """Draw one prompt with every family at every scale, from the same seeds."""
    if out.suffix and not out.is_dir():
        check_picture_name(out)
    if out.is_file() and not out.suffix:
        raise ValueError(
            f"--out is {out}, a file: expected a folder, or a picture such as {out}.png"
        )
    names = families or held_families(weights)
    values = scales or [1.0, 2.0, 4.0, 8.0, 16.0]
    with tqdm(total=len(names) * len(values), desc="drawing", unit="cell") as bar:

        def advance(family: str, scale: float) -> None:
            bar.update()

        result = draw_comparison(
            prompt,
            weights=weights,
            families=names,
            scales=values,
            seeds=range(seed, seed + n),
            progress=advance,
        )
    print(f"the picture is in {result.save(out)}")


def _open_picture(name: str, file: Path, size: int) -> Image.Image:
    """A picture, at the model's size if it is a square of whole multiples of it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has another size, or is no picture.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no picture at {file}")
    picture = Image.open(file).convert("RGB")
    width, height = picture.size
    if width != height or width % size:
        raise ValueError(
            f"--{name} {file} has {width} x {height} pixels, expected {size} x {size}, or a whole multiple of it"
        )
    return picture.resize((size, size), Image.Resampling.BOX)


def _prompts(prompt: str | None, file: Path | None) -> list[str]:
    """The prompts to draw, from the command line or a file.

    Raises:
        ValueError: if there are none, or both are given.
        FileNotFoundError: if the file is not there.
    """
    if (prompt is None) == (file is None):
        raise ValueError("expected either a PROMPT or --prompts FILE")
    if prompt is not None:
        return [prompt]
    assert file is not None
    if not file.is_file():
        raise FileNotFoundError(f"no prompts at {file}, expected a text file with one a line")
    try:
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8: {error}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise ValueError(f"{file} is empty, expected one prompt a line")
    return lines


def _arrange(
    prompts: list[str],
    scales: list[float],
    columns: list[list[Image.Image]],
    n: int,
    seed: int,
) -> Image.Image:
    """Lay out the images of every scale, prompt and seed.

    One prompt: a row a scale, a column a seed. Several prompts at one scale: a row a prompt, a column a seed.
    Several prompts and scales: a row a prompt and seed, a column a scale.
    """
    scale_labels = [f"s = {value:g}" for value in scales]
    seeds = [f"seed {seed + i}" for i in range(n)]
    if len(prompts) == 1:
        return grid(columns, row_labels=scale_labels, column_labels=seeds)
    if len(scales) == 1:
        rows = [columns[0][i : i + n] for i in range(0, len(columns[0]), n)]
        return grid(rows, row_labels=prompts, column_labels=seeds)
    rows = [list(row) for row in zip(*columns, strict=True)]
    names = [text if n == 1 else f"{text} ({label})" for text in prompts for label in seeds]
    return grid(rows, row_labels=names, column_labels=scale_labels)


def expand_lists(arguments: list[str]) -> list[str]:
    """Let ``--scales 0 1 2`` stand for ``--scales 0 --scales 1 --scales 2``, and likewise ``--families``."""
    expanded: list[str] = []
    option: str | None = None
    for argument in arguments:
        if argument in LIST_OPTIONS:
            option = argument
            continue
        if option is not None and LIST_OPTIONS[option](argument):
            expanded += [option, argument]
            continue
        if option is not None and (not expanded or expanded[-2:-1] != [option]):
            expanded.append(option)  # no value followed: let the parser complain
        option = None
        expanded.append(argument)
    if option is not None and expanded[-2:-1] != [option]:
        expanded.append(option)
    return expanded


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _is_family(text: str) -> bool:
    """A family, or one word in small letters that may be a mistyped one; a prompt behind it goes in front instead."""
    return text in MODEL_CLASSES or (text.isalpha() and text.islower())


# options that take several values, and what such a value looks like
LIST_OPTIONS: dict[str, Callable[[str], bool]] = {
    "--scales": _is_number,
    "--families": _is_family,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; errors of the user's making are one line, not a traceback."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(expand_lists(arguments), standalone_mode=False)
    except ParserError as error:
        text = error.format_message()  # type: ignore[attr-defined]
        if text.strip():  # without arguments the help has been shown
            print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
