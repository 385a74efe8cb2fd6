"""What the README shows is what happens: its Python runs, its files exist, its weights draw."""

import csv
import json
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from tiny import FAMILIES

from models import TextToImage
from models.folders import held_families, shipped_weights
from tokenizers_vq import to_float
from unicfg import Guidance
from unicfg.evaluation.accuracy import attribute_accuracy, scene_of
from unicfg.evaluation.attributes import read_scenes
from unicfg.evaluation.study import read_study
from unicfg.training.recipe import load_recipe
from unicfg.training.shapes import make_shapes

LEAST_ACCURACY = 95.0  # percent, of every family at its best scale
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SPEED = (ROOT / "docs/speed.md").read_text()
STUDIES = (ROOT / "docs/studies/README.md").read_text()


@pytest.mark.parametrize("page", ["README.md", "docs/index.md"])
def test_the_python_of_a_page_runs(page):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, page, "exec"), {})


def test_the_python_of_the_catalogue_runs():
    """With what its comment says is there already."""
    pipe, small_pipe = (TextToImage.from_pretrained("shapes", family="flow") for _ in range(2))
    prompts = ["a large red circle on a white background"]
    there = {"pipe": pipe, "small_pipe": small_pipe, "model": pipe.model, "ema": small_pipe.model}
    there |= {"prompts": prompts, "cond": pipe.encode_prompts(prompts), "seeds": [0]}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/catalogue.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/catalogue.md", "exec"), there)


def test_files_and_pictures_of_the_readme_exist():
    targets = re.findall(r"\]\(([^)#:]+)\)", README)
    assert len(targets) >= 5
    assert [t for t in targets if not (ROOT / t).exists()] == []
    tree = README.split("## What is where")[1].split("##")[0]
    for path in re.findall(r"^    (\w+)/ ", tree, re.MULTILINE):
        assert (ROOT / path).is_dir()


def ratios(name):
    """Of a committed speed table: (batch, what) -> times as fast."""
    found, batch = {}, 0
    for line in (ROOT / f"benchmarks/results/{name}.md").read_text().splitlines():
        if line.startswith("## Batch "):
            batch = int(line.removeprefix("## Batch "))
        row = re.match(r"\| (`?guided.*) \| ([\d.]+)x \|", line)
        if row:
            found[batch, row.group(1)] = row.group(2)
    return found


def test_speeds_of_the_readme_and_of_its_page_are_those_of_the_committed_tables():
    theirs, batched = "`transformers generate(guidance_scale=3)`", "transformers, both branches"
    minimal = "`a minimal loop, compiled, guided`"
    kinds = [
        [(batch, f"guided, against {theirs}") for batch in (1, 8, 16)],
        [(batch, f"guided, against `{batched} in one batch`") for batch in (1, 8, 16)],
        [(batch, f"guided, compiled, against {theirs}") for batch in (1, 8, 16)],
        [(1, f"guided, against unguided{how}") for how in ("", ", both compiled")],
        [(1, f"guided, compiled, against {minimal}")],
        [(batch, f"`guided_generate`, against {theirs}") for batch in (1, 8, 16)],
    ]
    machines = [ratios(name) for name in ("epyc/autoregressive", "autoregressive")]
    for kind in kinds:
        cells = [
            " / ".join(f"{own[key]} x" for key in kind) if kind[0] in own else "-"
            for own in machines
        ]
        assert f"| {cells[0]} | {cells[1]} |" in SPEED
    for name, how in (
        ("masked", "guided, against aMUSEd, guided"),
        ("masked", "guided, against muse-maskgit-pytorch, guided"),
        ("diffusion", "guided, against DiTPipeline, guided"),
        ("unet", "guided as theirs, against theirs"),
    ):
        cells = [f"{ratios(name)[batch, how]} x" for batch in (1, 8)]
        assert f"| {' / '.join(cells)} |" in SPEED
    short = README.split("| guided speed,")[1].split("\n\n")[0].splitlines()[2:]
    assert len(short) >= 5 and not set(short) - set(SPEED.splitlines())


def test_the_time_of_a_hybrid_is_that_of_the_committed_table():
    table = (ROOT / "benchmarks/results/families.md").read_text()

    def against_ar(name):
        rows = re.findall(rf"\| {name} \|.*\| ([\d.]+)x \|$", table, re.MULTILINE)
        return [float(ratio) for ratio in rows]

    narrow, wide, large = against_ar("hybrid")
    (compiled,) = against_ar("hybrid, compiled")
    assert max(narrow, wide) <= 3
    assert f"| {narrow:.2f} x / {wide:.2f} x |" in SPEED
    assert f"| {large:.2f} x / {compiled:.2f} x |" in SPEED


def test_the_divergence_of_int8_is_that_of_the_committed_table():
    table = (ROOT / "benchmarks/results/int8.md").read_text()
    found = [
        re.search(rf"\| {name} \| .*? \| .*? \| ([\d.]+) \|", table) for name in ("ar", "masked")
    ]
    assert f"| {' / '.join(row.group(1) for row in found if row)} |" in SPEED


def test_accuracies_of_the_readme_are_those_of_the_committed_table():
    table = (ROOT / "benchmarks/results/shapes-attributes.md").read_text()
    rows = [
        line
        for line in table.splitlines()
        if re.match(r"\| (family|ar|masked|diffusion|flow|hybrid) \|", line)
    ]
    assert len(rows) == 6
    for row in rows:
        assert row in README
    for row in rows[1:]:
        best, gain, error = measured(row, at_1=1)
        assert best >= LEAST_ACCURACY and gain + error >= 10, row
    # a family with less than 10 within its error has 10 on more prompts
    more = (ROOT / "benchmarks/results/n1024/shapes-attributes.md").read_text()
    (row,) = [line for line in more.splitlines() if line.startswith("| hybrid | ")]
    assert measured(row, at_1=0)[1] >= 10
    at_1, at_3 = re.findall(r"[\d.]+ \+- [\d.]+", row)
    assert f"from {at_1} to {at_3}" in README


def test_masked_draws_nearly_all_of_the_prompt_when_the_most_confident_tokens_come_first():
    """At temperature 1, where no scale of the fixed order reaches it; README quotes its row at s = 1 and 3."""
    table = (ROOT / "docs/studies/tokens/results.csv").read_text()
    rows = [r for r in csv.DictReader(table.splitlines()) if r["variant"].endswith("first, cosine")]
    shown = {}
    for row in rows:
        mean, error = (100 * float(row[key]) for key in ("attributes", "attributes_error"))
        shown[float(row["s"])] = (mean, f"{mean:.1f} +- {error:.1f}")
    assert max(mean for mean, _ in shown.values()) >= 97
    fixed = (r for r in csv.DictReader(table.splitlines()) if r["variant"] == "plain")
    assert max(float(r["attributes"]) for r in fixed if r["family"] == "masked") < 0.97
    assert f"{shown[1.0][1]} % at s = 1 and {shown[3.0][1]} at 3" in README


def test_compositions_of_the_page_on_studies_are_those_of_the_committed_table():
    results = json.loads((ROOT / "benchmarks/results/emoji-composition.json").read_text())
    for split, what in (("val_pair", "unseen"), ("train", "seen")):
        for row, how in (
            ("flow", "by the whole caption"),
            ("flow, by parts", "by its parts"),
            ("flow, the style late", "the style late"),
        ):
            cells = [results["families"][row][split][s] for s in ("1", "2", "3", "5")]
            for measure, label in (("concept_5", "concept"), ("style", "style")):
                own = [cell[measure] for cell in cells]
                shown = (f"{100 * c['mean']:.1f} +- {100 * c['standard_error']:.1f}" for c in own)
                line = f"| {what} pairs, {how} | {label} | {' | '.join(shown)} |"
                assert line in STUDIES.splitlines()

    def shown_of(row, measure, s):
        own = results["families"][row]["val_pair"][s][measure]
        return f"{100 * own['mean']:.0f} +- {100 * own['standard_error']:.0f}"

    prose = " ".join(README.split())
    parts, whole = shown_of("hybrid, by parts", "concept", "2"), shown_of("hybrid", "concept", "2")
    assert f"{parts} %, as in reconstructions; {whole} by the whole caption" in prose
    late, best = shown_of("flow, the style late", "style", "5"), shown_of("flow", "style", "3")
    assert f"{best} % by the whole caption, and {late} (reconstructions 70)" in prose


def measured(row, at_1):
    """Best accuracy, gain over s = 1, and the standard error at s = 1, which is the larger one."""
    means = [float(value) for value in re.findall(r"([\d.]+) \+-", row)]
    errors = [float(value) for value in re.findall(r"\+- ([\d.]+)", row)]
    return max(means), float(row.split("|")[-2]), errors[at_1]


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("emoji", "tiger in 3d style"),
        ("shapes", "a large red circle on a white background"),
    ],
)
def test_shipped_weights_are_small_documented_and_draw(name, prompt):
    folder = shipped_weights()[name]
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert size < {"emoji": 20e6, "shapes": 14e6}[name]
    assert (folder / "recipe.yaml").exists() and held_families(name) == FAMILIES
    assert "nats a token" in (folder / "README.md").read_text()
    for family in FAMILIES:
        pipe = TextToImage.from_pretrained(name, family)
        images = pipe([prompt] * 2, guidance=Guidance(3.0), seeds=[0, 1])
        assert all(np.asarray(image).std() > 5 for image in images)


def test_the_shapes_tokenizer_reconstructs_scenes_it_never_saw():
    """Seed 77 was used by no recipe; 34 dB leaves shapes intact, too."""
    tokenizer = TextToImage.from_pretrained("shapes").tokenizer
    images = to_float(make_shapes(64, seed=77).images)
    error = ((tokenizer.decode(tokenizer.encode(images)) - images) / 2).square().mean((1, 2, 3))
    assert float((-10 * error.log10()).mean()) > 34


@pytest.mark.parametrize("family", FAMILIES)
def test_guidance_draws_more_of_the_prompt_in_every_family(family):
    """Attributes read back from the pixels: few at s = 0, more at 1, most at 3; the table has more images."""
    pipe = TextToImage.from_pretrained("shapes", family)
    data = make_shapes(48, seed=4321, wrong=0.0)
    truth = [scene_of(attributes) for attributes in data.attributes]

    def accuracy(s: float) -> float:
        images = pipe.sample(data.captions, guidance=Guidance(s), seeds=list(range(48)))
        return attribute_accuracy(read_scenes(images), truth).mean

    assert accuracy(0.0) < 0.5 < accuracy(1.0) < accuracy(3.0)
    assert accuracy(3.0) > 0.75


def test_numbers_of_the_page_on_studies_are_those_of_the_committed_tables():
    page = STUDIES
    for name, measure, digits in (("shapes", "attributes", 1), ("emoji", "caption_top5", 1)):
        lines = (ROOT / f"docs/studies/{name}/results.csv").read_text().splitlines()
        rows = [
            dict(zip(lines[0].split(","), next(csv.reader([line])), strict=True))
            for line in lines[1:]
        ]
        assert len(rows) == {"shapes": 100, "emoji": 40}[name]
        for row in rows:
            value, error = (100 * float(row[key]) for key in (measure, f"{measure}_error"))
            if name == "emoji" and row["variant"] == "plain":
                assert f"{value:.{digits}f} +- {error:.{digits}f}" in page
            elif name == "shapes" and row["variant"] == "plain" and row["s"] == "15.0":
                assert f"{value:.{digits}f}" in page
    tables = [
        (ROOT / f"docs/studies/{name}/results.csv").read_text() for name in ("tokens", "weak")
    ]
    for row in chain.from_iterable(csv.DictReader(own.splitlines()) for own in tables):
        measures = {"attributes": (100, 1), "whole_scene": (100, 1), "open_entropy": (1, 2)}
        cells = [
            f"{f * float(row[m]):.{d}f} +- {f * float(row[f'{m}_error']):.{d}f}"
            for m, (f, d) in measures.items()
        ]
        words = "" if row["variant"] == "plain" else f"{row['variant']} "
        start = f"| {row['family']} | {float(row['s']):g} | {words}| "
        assert start + " | ".join(cells) + " |" in page
    own = read_study(ROOT / "docs/studies/shapes/study.json")
    # what is committed is what the file of the study asks for
    asked = read_study(ROOT / "examples/studies/shapes.yaml")
    assert (own.n, own.scales, own.variants) == (asked.n, asked.scales, asked.variants)
    targets = re.findall(r"\]\(([^)#:]+)[)#]", page)
    assert [t for t in targets if not (ROOT / "docs/studies" / t).exists()] == []


STUDIED = ("emoji", "shapes", "tokens", "weak")


@pytest.mark.parametrize(
    "file", sorted((ROOT / "examples/studies").glob("*.yaml")), ids=lambda f: f.name
)
def test_the_studies_among_the_examples_can_be_read(file):
    study = read_study(file)
    assert study.weights in shipped_weights() and study.variants[0].name == "plain"
    assert f"--study examples/studies/{file.name}" in file.read_text()


def test_variants_of_the_page_on_comparing_can_be_read(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/comparing.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "study.yaml").write_text("variants:\n" + blocks[0])
    assert len(read_study(tmp_path / "study.yaml").variants) == 3


def test_a_weaker_model_of_the_recipe_has_the_text_tokens_of_the_shapes_weights():
    """Or it could not guide them."""
    recipe = load_recipe(ROOT / "examples/recipes/shapes-weak.yaml")
    shapes = load_recipe(ROOT / "examples/recipes/shapes.yaml")
    assert (recipe.data, recipe.text) == (shapes.data, shapes.text)
    assert recipe.tokenizer.pretrained == "shapes"


@pytest.mark.parametrize("name", STUDIED)
def test_committed_studies_are_of_the_weights_that_ship(name):
    settings = json.loads((ROOT / f"docs/studies/{name}/study.json").read_text())
    for family, own in settings["families_settings"].items():
        pipe = TextToImage.from_pretrained(settings["weights"], family)
        assert own["weights_sha256"] == pipe.digest(), family


def test_every_promise_names_tests_that_are_there():
    """docs/reliability.md: a cell names files, and tests of the file before them; those of minutes are marked slow."""
    promises = [
        line for line in Path("docs/reliability.md").read_text().splitlines() if "`test_" in line
    ]
    assert len(promises) > 20
    for line in promises:
        file = None
        for marked, named, test in re.findall(r"(\*slow\* )?`(test_\w+\.py)?(?:::(\w+))?`", line):
            file = named or file
            if file is None:
                continue  # code of another kind
            code = (Path("tests") / file).read_text()
            if test:
                assert re.search(rf"^def {test}\(", code, re.MULTILINE), (file, test)
            if marked:
                assert "mark.slow" in code, (file, test)


def test_the_recipes_of_the_page_on_training_are_valid(tmp_path):
    blocks = re.findall(r"```yaml\n(.*?)```", Path("docs/training.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        file = tmp_path / "recipe.yaml"
        file.write_text(block if block.startswith("out:") else "out: run\n" + block)
        recipe = load_recipe(file)
        assert recipe.data.path or recipe.tokenizer.pretrained in shipped_weights()
