"""The command line: ``unicfg train RECIPE``, ``generate PROMPT``, ``compare PROMPT`` or ``--data``, and ``demo``."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image
from tqdm.auto import tqdm

from models import TextToImage
from models.batches import OutOfMemory
from models.folders import held_families
from models.pipeline import MODEL_CLASSES, Options
from unicfg.evaluation.comparison import check_folder
from unicfg.evaluation.comparison import compare as draw_comparison
from unicfg.evaluation.prompts import read_prompts
from unicfg.generation import BATCH, draw_folder
from unicfg.guidance import Guidance, branches
from unicfg.pictures import check_picture_name, grid, open_picture, save_picture
from unicfg.processes import join_processes
from unicfg.sampling import TokenFilter

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Classifier-free guidance, written once, for autoregressive, masked, diffusion, flow and hybrid models.",
)
# ClickException, whether typer takes it from click or from the copy that newer versions bring
ParserError: type[Exception] = typer.BadParameter.__mro__[2]


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file; see examples/recipes.")],
    family: Annotated[
        str | None,
        typer.Option(help="Instead of the recipe's: ar, masked, diffusion, flow or hybrid."),
    ] = None,
    resume: Annotated[bool, typer.Option(help="Go on where an interrupted run stopped.")] = False,
    until: Annotated[
        str, typer.Option(help="The last stage to run: images, tokenizer, codes or model.")
    ] = "model",
    fsdp: Annotated[
        bool, typer.Option(help="Split the model among the processes of torchrun.")
    ] = False,
) -> None:
    """Train an image tokenizer and a model on captioned images.

    Another family of the same recipe is added to the same folder and takes its tokenizer from there.

    Writes checkpoints, metrics.jsonl and sample grids into the folder that the recipe names as out. Several processes
    share the work: torchrun --nproc_per_node 2 -m unicfg train RECIPE.
    """
    # imported here: generating must not wait for the training libraries
    from unicfg.training.recipe import load_recipe
    from unicfg.training.trainer import train as run

    settings = load_recipe(recipe, family)
    try:
        pipe = run(settings, resume=resume, until=until, fsdp=fsdp)
    except KeyboardInterrupt:
        print("\ninterrupted: --resume goes on from the last checkpoint", file=sys.stderr)
        raise typer.Exit(130) from None
    if not join_processes().is_main_process:
        return
    if pipe is None:
        print(
            f"stopped after the stage {until}; {settings.out} has it: --resume goes on from there"
        )
        return
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
        float | None,
        typer.Option(help="s: 1 is the conditional model, more is stronger.", show_default="3.0"),
    ] = None,
    scales: Annotated[
        list[float] | None,
        typer.Option(help="Several scales at once, for a grid: --scales 0 1 2 4 8."),
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Images a prompt.", min=1)] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next has seed + 1.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Of the sampler; for all families but ar.", min=1)
    ] = None,
    solver: Annotated[
        str | None, typer.Option(help="diffusion, flow, hybrid: ddim, heun or dpmpp_2m.")
    ] = None,
    reveal: Annotated[
        str | None, typer.Option(help="masked: halton (the default), cosine, linear or arccos.")
    ] = None,
    choice_noise: Annotated[
        float | None,
        typer.Option(help="masked, but for halton: noise on the confidence [4.5].", min=0),
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
    out: Annotated[
        Path,
        typer.Option(
            help="The picture to write, or a folder for every image as a file of its own."
        ),
    ] = Path("out/unicfg.png"),
) -> None:
    """Draw images of a prompt, or a grid of several prompts or scales, into one picture or a folder.

    A folder gets metadata.jsonl and settings.json too, goes on where it was stopped, grows with more prompts, scales
    or -n, and is shared among the processes of torchrun or accelerate launch.
    """
    texts = _prompts(prompt, prompts)
    if scale is not None and scales:
        raise ValueError(f"--scale is {scale:g} with --scales, expected one of them")
    values = scales or [3.0 if scale is None else scale]
    # what is bad is refused before weights are read
    if negative is None and away != 1.0:
        raise ValueError(f"--away is {away} without --negative, expected both or none")

    def guidance_at(value: float) -> Guidance:
        return Guidance(value if negative is None else branches.negative(value, away))

    guidances = [guidance_at(value) for value in values]
    TokenFilter(temperature, top_k, top_p)
    into_folder = _is_folder(out)
    processes = join_processes()
    if not into_folder and processes.num_processes > 1:
        raise ValueError(
            f"--out is {out}, a picture, with {processes.num_processes} processes: expected a folder, whose images they "
            "can share, or one process"
        )
    pipe = TextToImage.from_pretrained(weights, family)
    known = {
        name: _open_picture(name, file, pipe.tokenizer.config.image_size)
        for name, file in (("init-image", init_image), ("mask", mask))
        if file is not None
    }
    options: Options = {
        "steps": steps,
        "solver": solver,
        "reveal": reveal,
        "choice_noise": choice_noise,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "guide_at": guide_at,
        "refresh": refresh,
        "compile": compile,
        "init_image": known.get("init-image"),
        "mask": known.get("mask"),
    }
    others = None if negative is None else {"negative": negative}
    if into_folder:
        try:
            count = draw_folder(
                pipe,
                texts,
                out,
                n=n,
                seed=seed,
                scales=values,
                guidance=guidance_at,
                branches=others,
                command=_command(),
                **options,
            )
        except KeyboardInterrupt:
            print("\ninterrupted: the same command goes on from there", file=sys.stderr)
            raise typer.Exit(130) from None
        if processes.is_main_process:
            print(f"{count} images are in {out}")
        return
    jobs = [(text, seed + i) for text in texts for i in range(n)]
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
                branches=others,
                batch_size=BATCH,
                callback=advance,
                **options,
            )
            columns.append(column)
    picture = _arrange(texts, values, columns, n, seed)
    print(f"the picture is in {save_picture(picture, out)}")


@app.command()
def compare(
    prompt: Annotated[
        str | None, typer.Argument(help="What to draw; or --data, for a whole study.")
    ] = None,
    scales: Annotated[
        list[float] | None,
        typer.Option(help="The columns [1 2 4 8 16]; of a study [0 1 1.5 2 3 5 8 15]."),
    ] = None,
    families: Annotated[
        list[str] | None, typer.Option(help="The rows; all that the weights hold.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Shipped weights (shapes), a folder, or a hub repository.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("-n", help="Seeds, a row each [1]; of a study: images a cell [256].", min=1),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the first image; the next has seed + 1.", min=0)
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="A study of many prompts: shapes, a folder of captioned images, or a text file with a prompt a line."
        ),
    ] = None,
    schedules: Annotated[
        list[str] | None, typer.Option(help='Of a study: --schedules "interval(s, 0.2, 0.8)" ...')
    ] = None,
    mitigations: Annotated[
        list[str] | None,
        typer.Option(help='Of a study: --mitigations "rescale(0.7)" "tcfg + mimic_scale(3)" ...'),
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(
            help="Of a study: images of each open prompt, to measure diversity [32].", min=0
        ),
    ] = None,
    features: Annotated[
        str | None,
        typer.Option(help="Of a study: lite0, pixels, or your own as package.module:function."),
    ] = None,
    study: Annotated[
        Path | None, typer.Option(help="A study's settings: YAML, or the study.json of another.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A picture to write [out/compare.png], or a folder for single images, or for the study [out/study]."
        ),
    ] = None,
) -> None:
    """Draw one prompt with every family at every scale, or make a whole study with a report.

    A study draws and measures a grid of families, scales, schedules and mitigations over many prompts, goes on where
    it was stopped, and shares its cells among the processes of torchrun or accelerate launch.
    """
    axes = {"scales": scales, "families": families, "weights": weights, "n": n, "seed": seed}
    more = {"data": data, "draws": draws, "features": features}
    given = {name: value for name, value in (axes | more).items() if value is not None}
    if study is not None or data is not None:
        if prompt is not None:
            raise ValueError(f"PROMPT is {prompt!r} with a study, expected one of them")
        _study(study, given, schedules or [], mitigations or [], out or Path("out/study"))
        return
    of_studies = {"schedules": schedules, "mitigations": mitigations, "features": features}
    for name, value in (of_studies | {"draws": draws}).items():
        if value is not None:
            raise ValueError(f"--{name} is of a study, expected --data or --study with it")
    if prompt is None:
        raise ValueError(
            "expected a PROMPT, --data or --study (a single word after --families is taken for a family: put the PROMPT first)"
        )
    out = out or Path("out/compare.png")
    if _is_folder(out):
        check_folder(out)
    if join_processes().num_processes > 1:
        raise ValueError(
            f"a PROMPT with {join_processes().num_processes} processes: expected one, or --data for a study that they share"
        )
    weights = weights or "shapes"
    names = families or held_families(weights)
    values = scales or [1.0, 2.0, 4.0, 8.0, 16.0]
    first = seed or 0
    with tqdm(total=len(names) * len(values), desc="drawing", unit="cell") as bar:

        def advance(family: str, scale: float) -> None:
            bar.update()

        result = draw_comparison(
            prompt,
            weights=weights,
            families=names,
            scales=values,
            seeds=range(first, first + (n or 1)),
            progress=advance,
        )
    print(f"the picture is in {result.save(out)}")


def _study(
    file: Path | None,
    given: dict[str, Any],
    schedules: list[str],
    mitigations: list[str],
    out: Path,
) -> None:
    """Make a study and its report; what is given on the command line takes the place of what the file says."""
    # imported here: drawing one prompt must not wait for the measures
    from unicfg.evaluation.report import write_report
    from unicfg.evaluation.study import Study, read_study, run
    from unicfg.evaluation.variants import Variant

    settings = Study() if file is None else read_study(file)
    changes: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    if "scales" in changes:  # the file's variants at those of its scales that are still asked for
        kept = [
            (own, tuple(s for s in own.scales if s in changes["scales"]))
            for own in settings.variants
        ]
        changes["variants"] = tuple(
            dataclasses.replace(own, scales=scales)
            for own, scales in kept
            if scales or not own.scales
        )
        settings = dataclasses.replace(
            settings, variants=changes["variants"], scales=changes["scales"]
        )
    extra = [Variant(text, scale=text) for text in schedules]
    extra += [Variant(text, mitigations=text) for text in mitigations]
    if extra:
        changes["variants"] = (*settings.variants, *extra)
    settings = dataclasses.replace(settings, **changes)
    results = run(settings, out, command=_command())
    if not join_processes().is_main_process:
        return
    failed = [own for own in results.cells if own.failure is not None]
    for own in failed:
        print(f"{own.cell}: {own.failure}", file=sys.stderr)
    print(f"the report is in {write_report(out)}")
    if len(failed) == len(results.cells):
        raise typer.Exit(1)


@app.command()
def demo(
    weights: Annotated[
        str, typer.Option(help="Shipped weights (shapes, emoji), a folder, or a hub repository.")
    ] = "shapes",
    families: Annotated[
        list[str] | None, typer.Option(help="To offer; all that the weights hold.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine reach 0.0.0.0.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 7860,
    names: Annotated[
        list[str] | None,
        typer.Option(
            "--name", help="Host as which a proxy or a tunnel reaches the page; repeatable."
        ),
    ] = None,
) -> None:
    """Serve a page to type prompts, move the scale, and watch families draw side by side."""
    # imported here: gradio takes seconds, and may not be there
    from unicfg.demo.page import launch

    launch(weights=weights, host=host, port=port, families=families, names=names or ())


def _command() -> str:
    """What was typed."""
    return f"unicfg {shlex.join(sys.argv[1:])}"


def _is_folder(out: Path) -> bool:
    """Whether ``--out`` is a folder for many files, as one that is there or has no suffix; else it is a picture.

    Raises:
        ValueError: if it is neither.
    """
    if out.is_file() and not out.suffix:
        raise ValueError(
            f"--out is {out}, a file: expected a folder, or a picture such as {out}.png"
        )
    if out.suffix and not out.is_dir():
        check_picture_name(out)
        return False
    return True


def _open_picture(name: str, file: Path, size: int) -> Image.Image:
    """A picture, at the model's size if it is a square of whole multiples of it.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it has another size, or is no picture.
    """
    if not file.is_file():
        raise FileNotFoundError(f"--{name}: no picture at {file}")
    try:
        picture = open_picture(file).convert("RGB")
    except (OSError, ValueError) as error:
        raise ValueError(f"--{name} {file} cannot be read: {error}") from error
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
    return read_prompts(file)


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


def _is_no_option(text: str) -> bool:
    return not text.startswith("-")


# options that take several values, and what such a value looks like
LIST_OPTIONS: dict[str, Callable[[str], bool]] = {
    "--scales": _is_number,
    "--families": _is_family,
    "--schedules": _is_no_option,
    "--mitigations": _is_no_option,
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
    except (ValueError, TypeError, OSError, FloatingPointError, ImportError, OutOfMemory) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
