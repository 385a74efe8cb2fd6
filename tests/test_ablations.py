"""The ablations train what they say, keep what is finished, and show what they measured."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.utils import set_seed
from matplotlib.figure import Figure

from models import TextToImage, TextTokenizer
from tokenizers_vq.files import read_tensors
from unicfg.training import encode, sources, trainer
from unicfg.training.families import make_network
from unicfg.training.recipe import load_recipe
from unicfg.training.shapes import make_shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import ablations

STEPS = 4
RUN = ["base", "dropout-0.5", "fixed-null", "prefix-8", "vq"]
FAMILIES = ["flow", "ar"]
SCHEDULE = {"batch_size": 32, "checkpoint_every": 2, "warmup": 1}
TINY = {
    "out": "unused",
    "data": {"source": "shapes", "image_size": 32, "count": 48, "validation": 0.25},
    "tokenizer": {"factor": 4, "width": 16, "depth": 1, "training": SCHEDULE | {"steps": 2}},
    "text": {"vocabulary": 512, "length": 16},
    "model": {"width": 32, "depth": 1, "heads": 2, "training": SCHEDULE},
    "families": {"flow": {"patch": 2}},
    "prompts": ["a red circle"],
}
# what each differs in from the base, written out
CHANGES = {
    "base": {},
    "dropout-0": {"model/condition_dropout": (0.1, 0.0)},
    "dropout-0.05": {"model/condition_dropout": (0.1, 0.05)},
    "dropout-0.2": {"model/condition_dropout": (0.1, 0.2)},
    "dropout-0.5": {"model/condition_dropout": (0.1, 0.5)},
    "fixed-null": {},
    "prefix-8": {"text/length": (16, 8)},
    "prefix-32": {"text/length": (16, 32)},
    "vq": {"tokenizer/quantizer": ("fsq", "vq")},
}


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Small settings; and how often each costly thing has been done since the counter was cleared."""
    recipe, done = tmp_path_factory.mktemp("recipe") / "tiny.yaml", Counter()
    recipe.write_text(yaml.safe_dump(TINY))
    with pytest.MonkeyPatch.context() as patch:

        def count(where, name):
            original = getattr(where, name)

            def counted(*args, **options):
                done[name] += 1
                return original(*args, **options)

            patch.setattr(where, name, counted)

        patch.setattr(ablations, "RECIPE", recipe)
        patch.setattr(ablations, "SCALES", (1.0, 3.0))
        for where, name in (
            (sources, "_write_round"),
            (encode, "encode_batches"),
            (trainer, "step_generator"),  # once a step of a model
            (trainer, "reconstruction_loss"),  # once a step of a tokenizer
            (ablations, "measure"),
        ):
            count(where, name)
        yield done


def run(folder, only=RUN, families=FAMILIES):
    options = ["--only", *only, "--families", *families, "-n", "4", "--steps", str(STEPS)]
    options += ["--work", str(folder / "work"), "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablations.py", *options])
        ablations.main()


@pytest.fixture(scope="module")
def finished(counts, tmp_path_factory):
    """A whole run of some variants, and what it took."""
    folder = tmp_path_factory.mktemp("ablations")
    counts.clear()
    run(folder)
    return folder, dict(counts)


def results_in(folder):
    return json.loads((folder / "out/ablations.json").read_text())


def test_each_variant_differs_from_the_base_in_what_it_says(tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "RECIPE", Path("examples/recipes/shapes.yaml").resolve())
    assert ablations.VARIANTS.keys() == CHANGES.keys()
    for family in FAMILIES:
        recipes = {name: ablations.recipe_of(name, family, 3000, tmp_path) for name in CHANGES}
        settings = {name: trainer._flat(asdict(own)) for name, own in recipes.items()}
        base = settings["base"]
        for name, own in settings.items():
            found = {key: (base[key], value) for key, value in own.items() if value != base[key]}
            assert found.pop("out", None) == (
                None if name == "base" else (base["out"], str(tmp_path / name))
            )
            assert found == CHANGES[name]
        training, own = recipes["base"].model.training, load_recipe(ablations.RECIPE, family).model
        steps, reach = own.training.steps, 1 / (1 - own.training.ema)
        assert reach / steps == pytest.approx(1 / (1 - training.ema) / 3000)
        assert training == replace(own.training, steps=3000, sample_every=3000, ema=training.ema)
        sizes = recipes["base"].model
        width, heads = (160, 5) if family in ("ar", "masked") else (128, 4)
        assert (sizes.width, sizes.depth, sizes.heads) == (width, 6, heads)


def networks(family, make, folder):
    recipe = ablations.recipe_of("base", family, STEPS, folder / "work")
    text = TextTokenizer.load(folder / "work/base/text.json")
    config = trainer._tokenizer_config(recipe.tokenizer, recipe.data.image_size)
    set_seed(recipe.model.training.seed)
    return make(recipe.model, config, text), int(text.null_condition[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_null_stays_zero_and_a_learned_one_moves(finished, family):
    folder, _ = finished
    key = "body.prefix.embedding.weight"
    learned, null = networks(family, make_network, folder)
    fixed, _ = networks(family, ablations.network_with_fixed_null, folder)
    before = learned.state_dict()
    for name, tensor in fixed.state_dict().items():
        other = before[name].clone()
        if name == key:
            assert other[null].any()
            other[null] = 0
        assert torch.equal(tensor, other)  # the same start but for that row
    after = {
        variant: TextToImage.from_pretrained(folder / "work" / variant, family).network.state_dict()
        for variant in ("base", "fixed-null")
    }
    assert not after["fixed-null"][key][null].any()
    assert not torch.equal(after["base"][key][null], before[key][null])
    # all else of the network is trained, and so are the rows of words that occur
    moved = (after["fixed-null"][key] != fixed.state_dict()[key]).any(1)
    assert moved.any() and not moved[null]
    # not the average alone
    last = sorted((folder / f"work/fixed-null/logs/{family}/checkpoints").iterdir())[-1]
    trained = read_tensors(last)[0]
    rows = [own[null] for name, own in trained.items() if name.endswith(key)]
    assert len(rows) == 2 and not any(row.any() for row in rows)


def test_what_variants_share_is_made_once(finished):
    folder, took = finished
    assert took["_write_round"] == 1
    # training and validation images of base, prefix-8 and vq
    assert took["encode_batches"] == 2 * 3
    assert took["reconstruction_loss"] == 2  # vq has one of its own
    assert took["step_generator"] == STEPS * len(RUN) * len(FAMILIES)
    assert took["measure"] == 2 * len(RUN) * len(FAMILIES)
    work = folder / "work"
    for name in RUN:
        assert (work / name / "images").resolve() == (work / "shared/images").resolve()
        assert (work / name / "codes").is_symlink() == (name not in ("prefix-8", "vq"))


def test_a_second_run_trains_and_measures_nothing(finished, counts):
    folder, _ = finished
    files = [folder / "out/ablations.json", folder / "out/ablations.md"]
    files += folder.glob("work/*/*/model.safetensors")
    before = [file.read_bytes() for file in files]
    counts.clear()
    run(folder, only=["base", "vq"])
    assert not counts
    assert [
        file.read_bytes() for file in files
    ] == before  # with the variants that were not asked for


def test_an_interrupted_run_goes_on(finished, counts, tmp_path, monkeypatch):
    folder, _ = finished

    def interrupted(where, name, after):
        original = getattr(where, name)

        def stops(*args, **options):
            if counts[name] == after:
                raise KeyboardInterrupt
            return original(*args, **options)

        counts.clear()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, stops)
            run(tmp_path, only=["base"], families=["flow"])

    interrupted(trainer, "step_generator", 3)
    interrupted(ablations, "measure", 1)
    assert counts["step_generator"] == STEPS - 2  # since the checkpoint
    counts.clear()
    run(tmp_path, only=["base"], families=["flow"])
    assert counts == {"measure": 1}
    assert (
        results_in(tmp_path)["variants"]["base"]["families"]["flow"]
        == (results_in(folder)["variants"]["base"]["families"]["flow"])
    )


def test_other_settings_do_not_mix_with_what_is_there(finished):
    work = finished[0] / "work"
    settings = results_in(finished[0])["settings"]
    assert ablations.collect(work, settings).keys() == set(RUN)
    assert not ablations.collect(work, settings | {"n": 5})
    with pytest.raises(ValueError, match=f"steps was {STEPS}, now 7"):
        ablations.train("base", "flow", 7, work)


def table_rows(text, title):
    """The cells of a section's table, without its head."""
    section = text.split(f"## {title}\n")[1].split("##")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_tables_show_the_numbers_of_the_json(finished):
    text, results = (finished[0] / "out/ablations.md").read_text(), results_in(finished[0])
    variants = results["variants"]
    for family in FAMILIES:
        rows = table_rows(text, family)
        assert [row[0] for row in rows] == RUN
        for name, *shown in rows:
            cells = list(variants[name]["families"][family]["accuracy"].values())
            for cell, own in zip(cells, shown, strict=True):
                numbers = [float(number) for number in re.findall(r"\d+\.\d", own)]
                assert numbers == pytest.approx(
                    [100 * cell["mean"], 100 * cell["standard_error"]], abs=0.051
                )
            bold = [cell["mean"] for cell, own in zip(cells, shown, strict=True) if "**" in own]
            assert bold == [max(cell["mean"] for cell in cells)]
    losses = {(row[0], row[1]): row[2:] for row in table_rows(text, "Validation losses")}
    assert losses.keys() == {(family, name) for family in FAMILIES for name in RUN}
    for (family, name), shown in losses.items():
        own = variants[name]["families"][family]
        assert [float(value) for value in shown] == pytest.approx(
            [*own["losses"].values(), own["tokens"], 100 * own["captions_cut"]], abs=0.051
        )
        log = finished[0] / f"work/{name}/logs/{family}/metrics.jsonl"
        last = json.loads(log.read_text().splitlines()[-1])
        assert own["losses"] == {
            "cond": last["validation_loss"],
            "uncond": last["validation_loss_uncond"],
        }
    # 4 x 4 patches and 8 x 8 tokens, with a prefix of 16 or 8
    tokens = {key: int(row[2]) for key, row in losses.items()}
    assert (tokens["flow", "base"], tokens["flow", "prefix-8"]) == (32, 24)
    assert (tokens["ar", "base"], tokens["ar", "prefix-8"]) == (80, 72)
    rows = {row[0]: row[1:] for row in table_rows(text, "Tokenizers")}
    assert rows.keys() == {"base", "vq"}
    assert [row[:2] for row in rows.values()] == [["1000", "4"], ["1024", "8"]]
    for name, row in rows.items():
        own = variants[name]["tokenizer"]
        shown = [own["psnr"], 100 * own["codebook_usage"], own["codebook_perplexity"]]
        assert [float(value) for value in row[2:5]] == pytest.approx(shown, abs=0.501)
    # the shipped one, not one that has had two steps
    assert float(rows["base"][2]) > 25 > float(rows["vq"][2])


def test_a_row_is_shown_when_all_of_it_is_there(finished):
    results = results_in(finished[0])
    del results["variants"]["vq"]["families"]["ar"]["accuracy"]["3"]
    rows = ablations.rows_by_family(results)
    assert {family: list(own) for family, own in rows.items()} == {"flow": RUN, "ar": RUN[:-1]}


def test_the_share_of_prompts_that_are_cut():
    captions = make_shapes(40, seed=3, wrong=0.0).captions
    text = TextTokenizer.train(captions, vocabulary=400, length=12)
    cut = [text.decode(text.encode([caption]))[0] != caption for caption in captions]
    assert 0 < sum(cut) < len(cut)
    assert ablations.share_cut(text, captions) == sum(cut) / len(cut)


def test_the_picture_has_a_curve_for_each_rate(finished, tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda *a, **b: (drawn.append(a[0]), save(*a, **b)))
    results = results_in(finished[0])
    ablations.plot(results, tmp_path / "own/rates.png")
    assert (tmp_path / "own/rates.png").stat().st_size
    (figure,) = drawn
    for axes in figure.axes:
        labels = [own.get_text() for own in axes.get_legend().get_texts()]
        assert labels == ["0.1", "0.5"]
        for name, bars in zip(("base", "dropout-0.5"), axes.containers, strict=True):
            cells = results["variants"][name]["families"][axes.get_title()]["accuracy"]
            assert bars[0].get_ydata() == pytest.approx(
                [100 * cell["mean"] for cell in cells.values()]
            )
    assert [axes.get_title() for axes in figure.axes] == ["ar", "flow"]
