"""Studies: every cell is what the pipeline draws, nothing finished is lost, and what is bad is refused or reported."""

import dataclasses
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, pipeline

from models import TextToImage
from models.perturb import perturb_attention, skip_layers
from tokenizers_vq import to_float
from tokenizers_vq.images import to_images
from unicfg import Branch, Guidance
from unicfg.cli import expand_lists, main
from unicfg.evaluation import study as studies
from unicfg.evaluation import tasks
from unicfg.evaluation.features import find_features
from unicfg.evaluation.provenance import versions
from unicfg.evaluation.report import write_report
from unicfg.evaluation.results import COLUMNS, Cell, Results
from unicfg.evaluation.study import Study, read_study, run
from unicfg.evaluation.variants import Variant
from unicfg.guidance import branches
from unicfg.guidance.schedules import interval, linear
from unicfg.training.shapes import make_shapes

SMALL = {"n": 20, "draws": 3, "features": "pixels", "scales": (1.0, 3.0)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "tiny"
    for family in ("ar", "flow", "hybrid"):
        pipeline(family=family).save_pretrained(out)
    return str(out)


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(CAPTIONS) + "\n\n")
    return str(file)


def tiles(file, size: int) -> list[np.ndarray]:
    sheet = np.asarray(Image.open(file))
    return [
        sheet[y : y + size, x : x + size]
        for y in range(0, sheet.shape[0], size)
        for x in range(0, sheet.shape[1], size)
    ]


def test_every_cell_is_what_the_pipeline_draws(weights, tmp_path):
    variants = (
        Variant(),
        Variant("late", "interval(s, 0.5, 1)", scales=(3.0,)),
        Variant("trust", mitigations="kl_trust_region(0.5)"),
    )
    results = run(
        Study(weights, variants=variants, families=("ar", "flow"), seed=5, **SMALL),
        tmp_path / "out",
        progress=False,
    )
    # a trust region of logits has no meaning for velocities, and the late variant has one scale
    found = [own.cell for own in results.cells]
    ar = [Cell("ar", "plain", s) for s in (1.0, 3.0)] + [Cell("ar", "late", 3.0)]
    ar += [Cell("ar", "trust", s) for s in (1.0, 3.0)]
    flow = [Cell("flow", "plain", s) for s in (1.0, 3.0)] + [Cell("flow", "late", 3.0)]
    assert found == ar + flow
    scenes = make_shapes(20, size=16, seed=77, wrong=0.0)
    for cell, guidance in (
        (Cell("ar", "late", 3.0), Guidance(interval(3.0, 0.5, 1.0))),
        (Cell("flow", "plain", 3.0), Guidance(3.0)),
    ):
        pipe = TextToImage.from_pretrained(weights, cell.family)
        images = pipe(scenes.captions, seeds=range(5, 25), guidance=guidance)
        drawn = tiles(results.folder / cell.folder / "images.png", 16)
        assert len(drawn) == 2 * COLUMNS
        for own, image in zip(drawn, images, strict=False):
            assert np.array_equal(own, np.asarray(image))
    # the last moment of what is on its way is the image itself
    way = np.asarray(Image.open(results.folder / ar[1].folder / "steps.png"))
    first = tiles(results.folder / ar[1].folder / "images.png", 16)[0]
    assert np.array_equal(way[:16, -16:], first) and way.shape == (32, 8 * 16, 3)


def test_cells_know_their_strength_their_cost_and_why_a_measure_is_missing(weights, tmp_path):
    results = run(
        Study(weights, families=("ar", "hybrid"), **{**SMALL, "scales": (0.0, 1.0, 3.0)}),
        tmp_path / "out",
        progress=False,
    )
    cells = {(own.cell.family, own.cell.s): own for own in results.cells}
    assert "not run at every step" in cells["ar", 0.0].missing["strength"]
    assert cells["ar", 1.0].measures["strength"].value == 0
    assert cells["hybrid", 3.0].measures["strength"].value > 0
    assert cells["ar", 1.0].measures["positions"].value == 16
    assert cells["ar", 3.0].measures["positions"].value == 32
    assert cells["ar", 1.0].measures["rate"].value > 0
    assert "kid has 20 real images" in cells["ar", 3.0].missing["kid"]
    assert "codebook" in cells["ar", 3.0].measures
    assert "codebook" not in cells["hybrid", 3.0].measures
    trace = cells["ar", 3.0].trace
    assert len(trace["kl"]) == 16 and trace["scale"] == [3.0] * 16
    assert sum(trace["kl"]) == pytest.approx(cells["ar", 3.0].measures["strength"].value, rel=1e-4)
    assert np.sum(trace["places"]) == pytest.approx(sum(trace["kl"]), rel=1e-4)
    assert trace["progress"][-1] == 1.0 and cells["ar", 1.0].trace["cosine"] == [None] * 16
    real = results.reference["real images"]
    assert real["attributes"].value > 0.9
    # 3 draws are too few for an entropy, and enough for nothing
    assert "open_entropy" in cells["ar", 3.0].missing
    wrong = results.reference["shuffled captions"]["attributes"].value
    assert wrong < results.reference["real images"]["attributes"].value - 0.3


def numbers(results: Results) -> dict:
    return {
        str(own.cell): {
            name: e
            for name, e in own.to_json()["measures"].items()
            if name not in ("seconds", "rate")
        }
        | {"trace": own.to_json()["trace"]}
        for own in results.cells
    }


def test_a_study_goes_on_where_it_was_stopped_and_gives_the_same_numbers(
    weights, tmp_path, monkeypatch
):
    plan = Study(weights, families=("ar", "flow"), **SMALL)
    whole = run(plan, tmp_path / "whole", progress=False)
    finished, real = [], studies._Work.finish

    def stopped(self, job, *, timed):
        if len(finished) == 2:
            raise KeyboardInterrupt
        real(self, job, timed=timed)
        finished.append(job.cell)

    monkeypatch.setattr(studies._Work, "finish", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "out", progress=False)
    monkeypatch.setattr(studies._Work, "finish", real)
    assert len(Results.load(tmp_path / "out").cells) == 2
    # a cell that was cut off in the middle of writing counts for nothing
    broken = tmp_path / "out" / finished[1].folder / "cell.json"
    broken.write_text(broken.read_text()[:100])
    drawn, own = [], studies._draw
    monkeypatch.setattr(
        studies, "_draw", lambda pipe, *a: drawn.append(pipe.family) or own(pipe, *a)
    )
    results = run(plan, tmp_path / "out", progress=False)
    assert drawn == ["ar", "flow", "flow"]
    assert numbers(results) == numbers(whole)
    # more scales: what is there stays
    more = Study(weights, families=("ar",), **{**SMALL, "scales": (1.0, 2.0, 3.0)})
    drawn.clear()
    grown = run(more, tmp_path / "out", progress=False)
    assert drawn == ["ar"]
    found = [(own.cell.family, own.cell.s) for own in grown.cells]
    assert found == [("ar", 1.0), ("ar", 2.0), ("ar", 3.0), ("flow", 1.0), ("flow", 3.0)]
    # and further variants; one of the same name that is another is refused
    with_late = Study(
        weights, variants=(Variant("late", "interval(s, 0.5, 1)"),), families=("ar",), **SMALL
    )
    assert len(run(with_late, tmp_path / "out", progress=False).cells) == 7
    assert read_study(tmp_path / "out" / "study.json").scales == (1.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="differs in the variant 'late'"):
        run(
            Study(weights, variants=(Variant("late", "2 * s"),), families=("ar",), **SMALL),
            tmp_path / "out",
            progress=False,
        )


def test_two_processes_share_the_cells_and_find_the_same(weights, tmp_path):
    # enough for all measures: some of them would wait for the other process, if they were let
    options = ["compare", "--data", "shapes", "--weights", weights, "-n", "130", "--draws", "2"]
    options += ["--scales", "1", "3", "--families", "ar", "flow", "--features", "pixels"]
    script = tmp_path / "go.py"
    script.write_text(
        "import os, sys\n"
        "from unicfg.cli import main\n"
        "from unicfg.evaluation import study\n"
        "drawn, real = [], study._draw\n"
        "study._draw = lambda *a: drawn.append(a) or real(*a)\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(f'\\nrank {os.environ[\"RANK\"]} drew {len(drawn)}', flush=True)\n"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [sys.executable, *launch, *options, "--out", str(tmp_path / "two")],
        env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("the report is in") == 1
    assert {"rank 0 drew 2", "rank 1 drew 2"} <= set(done.stdout.splitlines())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the two have it: with another number floats round otherwise
    alone = run(
        Study(
            weights,
            n=130,
            draws=2,
            scales=(1.0, 3.0),
            families=("ar", "flow"),
            features="pixels",
        ),
        tmp_path / "one",
        progress=False,
    )
    torch.set_num_threads(threads)
    both = Results.load(tmp_path / "two")
    assert "drawn by one process alone" in both.cells[0].missing["seconds"]
    assert [own.cell for own in both.cells] == [own.cell for own in alone.cells]
    for ours, theirs in zip(both.cells, alone.cells, strict=True):
        name = f"{ours.cell.folder}/images.png"
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
        for measure in ("strength", "kid", "fd", "precision"):
            found = [own.measures[measure].value for own in (ours, theirs)]
            assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_scale_that_makes_nan_is_reported_and_the_study_goes_on(
    weights, prompts, tmp_path, capsys
):
    sick = tmp_path / "sick"
    pipeline(family="flow").save_pretrained(sick)
    broken = pipeline(family="ar")
    next(iter(broken.network.parameters())).data.fill_(math.nan)
    broken.save_pretrained(sick)
    command = ["compare", "--data", prompts, "--weights", str(sick), "-n", "4", "--draws", "0"]
    out = tmp_path / "out"
    run_cli([*command, "--features", "pixels", "--scales", "3", "--out", str(out)])
    said = capsys.readouterr()
    assert "ar s=3: the model's output holds NaN or +inf at token 0" in said.err
    assert f"the report is in {out / 'report.html'}" in said.out
    cells = Results.load(out).cells
    assert [own.failure is None for own in cells] == [False, True]
    assert "holds NaN" in (out / "report.html").read_text()


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"made_with": [1]}', "[" * 5000])
def test_what_cannot_be_read_is_made_anew(weights, tmp_path, damage):
    plan, out = Study(weights, families=("flow",), **{**SMALL, "scales": (3.0,)}), tmp_path / "out"
    run(plan, out, progress=False)
    (cell,) = out.rglob("cell.json")
    files = {own: own.read_bytes() for own in (cell, out / "reference.json")}
    for file in files:
        file.write_text(damage)
    run(plan, out, progress=False)
    for file, content in files.items():
        before, now = json.loads(content), json.loads(file.read_text())
        assert now["made_with"] == before["made_with"]
        assert now["measures"].keys() == before["measures"].keys()


def test_a_full_disk_is_an_error_and_finished_cells_stay(weights, tmp_path, monkeypatch):
    plan, real = Study(weights, families=("ar",), **SMALL), studies.save_picture

    def full(image, file):
        if "s3" in str(file):
            raise OSError(f"could not write {file}: No space left on device")
        return real(image, file)

    monkeypatch.setattr(studies, "save_picture", full)
    with pytest.raises(OSError, match="No space left"):
        run(plan, tmp_path / "out", progress=False)
    assert [own.cell.s for own in Results.load(tmp_path / "out").cells] == [1.0]


def test_a_folder_with_something_else_is_refused(weights, tmp_path):
    plan = Study(weights, families=("ar",), **SMALL)
    run(plan, tmp_path / "out", progress=False)
    other = Study(weights, families=("ar",), **{**SMALL, "n": 21})
    with pytest.raises(ValueError, match=r"holds another study, which differs in n \(20 there, 21"):
        run(other, tmp_path / "out", progress=False)
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "study.json").write_text('{"study": 3}')
    with pytest.raises(ValueError, match="is not the settings of a study"):
        run(plan, strange, progress=False)
    left = tmp_path / "left"  # by a study that was killed as it wrote its first file
    left.mkdir()
    (left / ".study.json.123.tmp").write_text("{")
    assert studies._fitting(left, {"study": {}}) == {"study": {}}
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no study"):
        run(plan, tmp_path / "notes", progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"families": ("ar", "masked")}, "holds the families ar, flow, hybrid, not masked"),
        ({"data": "nowhere"}, "data is 'nowhere', expected 'shapes', a folder"),
        ({"features": "mine"}, "mine"),
    ],
)
def test_what_is_not_there_is_told_before_anything_is_written(weights, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(Study(weights, **{**SMALL, **changes}), tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


def test_the_share_that_is_held_out_is_that_of_the_training(weights, tmp_path):
    assert studies._held_out_share("emoji") == tasks.HELD_OUT == 0.1
    run_folder = tmp_path / "run"
    shutil.copytree(weights, run_folder)
    (run_folder / "recipe.json").write_text(json.dumps({"data": {"validation": 0.03}}))
    assert studies._held_out_share(str(run_folder)) == 0.03


def test_a_variant_that_fits_no_family_is_refused_and_one_left_out_is_told(weights, tmp_path):
    trust = Variant("trust", mitigations="kl_trust_region(0.5)")
    with pytest.raises(ValueError, match=r"the variant 'trust' fits no family: .*logits"):
        run(Study(weights, variants=(trust,), families=("flow",), **SMALL), tmp_path / "out")
    plan = Study(weights, variants=(Variant(), trust), **{**SMALL, "scales": (1.0,)})
    results = run(plan, tmp_path / "out", progress=False)
    left = [(own["family"], own["variant"]) for own in results.settings["left_out"]]
    assert left == [("flow", "trust"), ("hybrid", "trust")]


def test_a_study_of_fewer_families_may_keep_a_variant_that_only_others_have(weights, tmp_path):
    trust = Variant("trust", mitigations="kl_trust_region(0.5)")
    settings = {**SMALL, "scales": (1.0,), "families": ("flow",)}
    results = run(
        Study(weights, variants=(Variant(), trust), **settings), tmp_path / "out", progress=False
    )
    assert [cell.cell.variant for cell in results.cells] == ["plain"]
    assert [own["variant"] for own in results.settings["left_out"]] == ["trust"]
    odd = Variant("odd", sampler={"reveal": "halton"})  # of a family that these weights do not hold
    with pytest.raises(ValueError, match="'odd' fits no family"):
        run(Study(weights, variants=(Variant(), odd), **settings), tmp_path / "other")


def test_a_variant_is_tried_where_it_is_drawn_and_left_out_even_if_it_changes_nothing(
    weights, tmp_path
):
    inverse = Variant("inverse", scale="linear(1, 1 / s)", scales=(3.0,))  # not at s = 0
    usual = Variant("usual", sampler={"temperature": 1.0})
    plan = Study(weights, variants=(inverse, usual), **{**SMALL, "scales": (0.0, 3.0)})
    results = run(plan, tmp_path / "out", progress=False)
    drawn = {(own.cell.family, own.cell.variant, own.cell.s) for own in results.cells}
    assert {own[2] for own in drawn if own[1] == "inverse"} == {3.0}
    left = [(own["family"], own["variant"], own["reason"]) for own in results.settings["left_out"]]
    assert ("flow", "usual", "the family flow has no temperature") in left
    plain = [own for own in results.cells if own.cell == Cell("ar", "usual", 3.0)]
    assert len(plain) == 1 and "strength" in plain[0].measures  # temperature 1 leaves all as it is


def test_options_of_a_variant_reach_all_that_is_drawn(weights, tmp_path, monkeypatch):
    cold = Variant("cold", sampler={"temperature": 0})
    few = Variant("few", sampler={"solver": "heun", "steps": 3})
    drawn, real = {}, studies._draw

    def draw(pipe, *a):
        return drawn.setdefault((pipe.family, len(drawn)), real(pipe, *a))

    monkeypatch.setattr(studies, "_draw", draw)
    plan = Study(weights, variants=(cold, few), families=("ar", "flow"), **SMALL)
    results = run(plan, tmp_path / "out", progress=False)
    left = [(own["family"], own["variant"], own["reason"]) for own in results.settings["left_out"]]
    assert [own[:2] for own in left] == [("ar", "few"), ("flow", "cold")]
    assert "solver is 'heun', which the family ar does not have" in left[0][2]
    assert "temperature is 0.0, which the family flow does not have" in left[1][2]
    assert [own.cell.variant for own in results.cells] == ["cold", "cold", "few", "few"]
    for own in (
        results.cells
    ):  # what is recorded of tokens is what temperature and filters have not touched
        unseen = own.cell.variant == "cold"
        assert ({"strength", "entropy"} <= own.missing.keys()) == unseen
        assert ("strength" in own.measures) is not unseen
    scenes = make_shapes(20, size=16, seed=77, wrong=0.0)
    for cell, options in (
        (Cell("ar", "cold", 3.0), {"temperature": 0.0}),
        (Cell("flow", "few", 3.0), {"solver": "heun", "steps": 3}),
    ):
        pipe = TextToImage.from_pretrained(weights, cell.family)
        calls = {"seeds": range(20), "guidance": Guidance(3.0)}
        images = pipe(scenes.captions, **calls, **options)
        sheet = tiles(results.folder / cell.folder / "images.png", 16)
        for own, image in zip(sheet, images, strict=False):
            assert np.array_equal(own, np.asarray(image))
        plain = pipe(scenes.captions, **calls)
        assert any(np.any(np.subtract(a, b, dtype=int)) for a, b in zip(images, plain, strict=True))
        # the last moment of what is on its way is the image itself
        way = np.asarray(Image.open(results.folder / cell.folder / "steps.png"))
        assert np.array_equal(way[:16, -16:], sheet[0])
        assert way.shape == (32, min(8, options.get("steps", 16)) * 16, 3)
    # what is drawn many times: without chance every seed gives the same image
    ar, flow = (own for (_, i), own in drawn.items() if i in (1, 3))
    each = ar.opened.unflatten(0, (-1, 3))
    torch.testing.assert_close(each, each[:, :1].expand_as(each), atol=1e-5, rtol=0)
    assert len(flow.trace.progress) == 3
    # two evaluations a step but for the last one, two branches, and 2 x 2 patches
    assert results.cells[-1].measures["positions"].value == 5 * 2 * 4


def test_rows_that_are_not_run_cost_nothing(weights, tmp_path):
    plain = Variant(sampler={"steps": 5})
    rarely = Variant("refresh", sampler={"steps": 5, "refresh": 2})
    results = run(
        Study(weights, variants=(plain, rarely), families=("flow",), **SMALL),
        tmp_path / "out",
        progress=False,
    )
    found = {
        (own.cell.variant, own.cell.s): own.measures["positions"].value for own in results.cells
    }
    # 4 patches; of 5 steps 3 run both branches
    assert found == {("plain", 1): 20, ("plain", 3): 40, ("refresh", 1): 20, ("refresh", 3): 32}


def test_a_hybrid_can_be_guided_elsewhere_than_in_its_head(weights, tmp_path):
    both = Variant("both", sampler={"guide_at": "both", "steps": 2})
    plan = Study(weights, variants=(both,), families=("hybrid",), **SMALL)
    cell = run(plan, tmp_path / "out", progress=False).cells[1]
    assert cell.failure is None and cell.measures["positions"].value == 32
    assert "states" in cell.missing["strength"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0, expected a finite number >= 0"),
        ({"top_k": 0}, "top_k is 0, expected an int >= 1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected 0 < top_p <= 1"),
        ({"solver": "euler"}, "solver is 'euler', expected one of ddim"),
        ({"steps": 0}, "steps is 0, expected an int of at least 1"),
        ({"refresh": -1}, "refresh is -1, expected an int >= 1"),
        ({"guide_at": "nowhere"}, "guide_at is 'nowhere', expected one of head"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_drawn(
    weights, tmp_path, options, message
):
    plan = Study(weights, variants=(Variant(), Variant("odd", sampler=options)), **SMALL)
    with pytest.raises(ValueError, match=f"^the variant 'odd': {message}"):
        run(plan, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Another training of two of the families, with the same tokenizer and text."""
    out = tmp_path_factory.mktemp("others") / "tiny"
    for family in ("ar", "flow"):
        pipe = pipeline(family=family)
        for parameter in pipe.network.parameters():
            parameter.data.mul_(0.8)
        pipe.save_pretrained(out)
    return str(out)


@pytest.mark.parametrize("family", ["ar", "flow"])
def test_branches_of_a_variant_are_what_the_pipeline_draws(weights, others, tmp_path, family):
    variants = (
        Variant(),
        Variant("other", "weak(s)", branches={"weak": {"weights": others}}),
        Variant("skipped", "weak(linear(1, s))", branches={"weak": {"skip_layers": [0]}}),
        Variant("blind", "weak(s, cfg=2)", branches={"weak": {"perturb_attention": [-1]}}),
        Variant("away", "negative(s, 1)", branches={"negative": "a red circle"}),
    )
    plan = Study(weights, variants=variants, families=(family,), **{**SMALL, "scales": (3.0,)})
    results = run(plan, tmp_path / "out", progress=False)
    scenes = make_shapes(20, size=16, seed=77, wrong=0.0)
    pipe = TextToImage.from_pretrained(weights, family)
    other = TextToImage.from_pretrained(others, family)
    skipped = Branch(model=skip_layers(pipe.network, [0]))
    blind = Branch(model=perturb_attention(pipe.network, [-1]))
    expected = {
        "plain": (Guidance(3.0), None),
        "other": (Guidance(branches.weak(3.0)), {"weak": other}),
        "skipped": (Guidance(branches.weak(linear(1, 3.0))), {"weak": skipped}),
        "blind": (Guidance(branches.weak(3.0, 2.0)), {"weak": blind}),
        "away": (Guidance(branches.negative(3.0, 1.0)), {"negative": "a red circle"}),
    }
    cells = {own.cell.variant: own for own in results.cells}
    assert cells.keys() == expected.keys()
    sheets = {}
    for name, (guidance, given) in expected.items():
        images = pipe(scenes.captions, seeds=range(20), guidance=guidance, branches=given)
        folder = results.folder / cells[name].cell.folder
        sheets[name] = tiles(folder / "images.png", 16)[:20]
        for own, image in zip(sheets[name], images, strict=True):
            assert np.array_equal(own, np.asarray(image))
        way = np.asarray(Image.open(folder / "steps.png"))
        assert np.array_equal(way[:16, -16:], sheets[name][0])
        assert cells[name].measures["strength"].value > 0
    assert len({np.stack(own).tobytes() for own in sheets.values()}) == len(expected)
    # every network that runs is paid for: two branches, or three
    cost = {name: own.measures["positions"].value for name, own in cells.items()}
    assert cost["other"] == cost["plain"] and cost["blind"] == cost["away"]
    assert cost["away"] == cost["plain"] * 3 / 2
    assert len({own.made_with for own in results.cells}) == len(expected)

    # it can be read back, and a finished cell knows the weights that its branch had
    assert read_study(results.folder / "study.json").variants == plan.variants
    times = {own: own.stat().st_mtime_ns for own in results.folder.rglob("cell.json")}
    run(plan, results.folder, progress=False)
    assert all(own.stat().st_mtime_ns == then for own, then in times.items())
    moved = Variant("other", "weak(s)", branches={"weak": {"weights": weights}})
    with pytest.raises(ValueError, match="differs in the variant 'other'"):
        run(dataclasses.replace(plan, variants=(moved,)), results.folder, progress=False)


def test_cells_of_a_branch_that_was_trained_again_are_drawn_again(weights, others, tmp_path):
    weak = tmp_path / "weak"
    shutil.copytree(others, weak)
    variant = Variant("other", "weak(s)", branches={"weak": {"weights": str(weak)}})
    plan = Study(
        weights, variants=(Variant(), variant), families=("flow",), **SMALL | {"scales": (2.0, 3.0)}
    )
    first = run(plan, tmp_path / "out", progress=False)
    (own,) = first.settings["branches"].values()
    assert own == {"weak": TextToImage.from_pretrained(weak, "flow").digest()}
    pipe = TextToImage.from_pretrained(weak, "flow")
    next(pipe.network.parameters()).data.add_(0.1)
    pipe.save_pretrained(weak)
    half = dataclasses.replace(plan, scales=(2.0,))
    again = run(half, tmp_path / "out", progress=False)
    # at 3 the branch is of weights that are no more, and plain guidance has none
    found = [(own.cell.variant, own.cell.s) for own in again.cells]
    assert found == [("plain", 2.0), ("plain", 3.0), ("other", 2.0)]
    old, new = ({own.cell: own.made_with for own in r.cells} for r in (first, again))
    assert old[Cell("flow", "plain", 2.0)] == new[Cell("flow", "plain", 2.0)]
    assert old[Cell("flow", "other", 2.0)] != new[Cell("flow", "other", 2.0)]
    assert len(run(plan, tmp_path / "out", progress=False).cells) == 4


def test_branches_in_a_file_are_those_that_the_scale_names(weights, others, tmp_path):
    file = tmp_path / "study.yaml"
    head = "n: 20\ndraws: 0\nfeatures: pixels\nscales: [3]\n" + f"weights: {weights}\n"
    file.write_text(
        head
        + "variants:\n"
        + "  - {name: skipped, scale: weak(s), branches: {weak: {skip_layers: [0]}}}\n"
        + f"  - {{name: other, scale: weak(s), branches: {{weak: {{weights: {others}}}}}}}\n"
        + "  - {name: away, scale: 'perp_neg(s, 1)', branches: {negative: a <b> circle}}\n"
    )
    results = run(read_study(file), tmp_path / "out", progress=False)
    left = [(own["family"], own["variant"], own["reason"]) for own in results.settings["left_out"]]
    # other weights hold two families, and an angle has no meaning in logits
    assert [own[:2] for own in left] == [("ar", "away"), ("hybrid", "other")]
    assert "logits" in left[0][2] and "holds the families ar, flow, not hybrid" in left[1][2]
    drawn = [(own.cell.family, own.cell.variant) for own in results.cells]
    assert drawn == [
        *(("ar", name) for name in ("skipped", "other")),
        *(("flow", name) for name in ("skipped", "other", "away")),
        *(("hybrid", name) for name in ("skipped", "away")),
    ]
    write_report(results.folder)
    page = (results.folder / "report.html").read_text()
    assert "<th>branches</th>" in page
    assert "weak: skip_layers [0]" in page and "a &lt;b&gt; circle" in page
    assert "a <b> circle" not in page


@pytest.mark.parametrize(
    ("scale", "own", "message"),
    [
        ("weak(s)", {}, r"has the branches \[\], expected \['weak'\], which its scale 'weak\(s\)'"),
        ("s", {"weak": {"skip_layers": [0]}}, r"has the branches \['weak'\], expected \[\]"),
        ("weak(s)", {"negative": "a"}, r"has the branches \['negative'\], expected \['weak'\]"),
        (
            "weak(s)",
            {"weak": {"skip_layers": 0}},
            r"the branch 'weak' is .*, expected a prompt, {w",
        ),
        ("weak(s)", {"weak": {"skip_layers": [True]}}, "the branch 'weak' is"),
        ("weak(s)", {"weak": {"prune": [0]}}, "the branch 'weak' is"),
        ("weak(s)", {"weak": {}}, "the branch 'weak' is {}"),
        ("weak(s)", {"weak": 3}, "the branch 'weak' is 3"),
        ("weak(s)", {"weak": {"weights": 3}}, "the branch 'weak' is"),
        (
            "weak(s)",
            {"weak": {"skip_layers": [9]}},
            r"no family: .* the branch 'weak': layers is \[9\], expected",
        ),
        (
            "weak(s)",
            {"weak": {"weights": "nowhere"}},
            "the variant 'x': the branch 'weak': no pipeline at 'nowhere'",
        ),
    ],
)
def test_branches_that_cannot_be_run_are_refused(weights, tmp_path, scale, own, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(
            Study(weights, variants=(Variant("x", scale, branches=own),), **SMALL),
            tmp_path / "out",
            progress=False,
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temprature": 1}, "temprature is 1, which is no option of a variant: expected one of st"),
        ({"compile": True}, "compile is True, which is no option"),
        ({"mask": "a.png"}, "mask is 'a.png', which is no option"),
        ({"temperature": "warm"}, "temperature is 'warm', expected a finite number"),
        ({"temperature": True}, "temperature is True, expected a finite number"),
        ({"top_p": math.nan}, "top_p is nan, expected a finite number"),
        ({"top_p": None}, "top_p is None, expected a finite number"),
        ({"steps": 8.0}, "steps is 8.0, expected an int"),
        ({"steps": True}, "steps is True, expected an int"),
        ({"steps": 10**9}, "steps is 1000000000, expected an int of at most 1000000"),
        ({"solver": 3}, "solver is 3, expected a text"),
    ],
)
def test_options_of_another_type_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^the variant 'odd': {message}"):
        Variant("odd", sampler=options)


def test_options_that_no_family_has_are_refused(weights, tmp_path):
    halton = Variant("halton", sampler={"reveal": "halton"})
    with pytest.raises(
        ValueError, match=r"the variant 'halton' fits no family: reveal is 'halton'"
    ):
        run(Study(weights, variants=(halton,), **SMALL), tmp_path / "out", progress=False)


def test_options_are_kept_in_files_and_change_what_a_cell_is_made_with(weights, tmp_path):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    settings = (
        f"n: 20\ndraws: 3\nfeatures: pixels\nscales: [3]\nfamilies: [ar]\nweights: {weights}\n"
    )
    file.write_text(
        settings + "variants: [{name: plain}, {name: cool, sampler: {temperature: 1, top_k: 3}}]\n"
    )
    plan = read_study(file)
    cool = Variant("cool", sampler={"top_k": 3, "temperature": 1.0})
    assert plan.variants == (Variant(), cool) and len({*plan.variants}) == 2
    plain, other = run(plan, out, progress=False).cells
    assert read_study(out / "study.json") == plan

    def hashed(*parts):
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    # what cells were made with before variants had options: it must stay, or finished studies are drawn again
    pipe = TextToImage.from_pretrained(weights, "ar")
    task = tasks.read_task("shapes", 20, 16, draws=3)
    images = [
        hashlib.sha256(own.numpy().tobytes()).hexdigest()
        for own in (task.real, task.others, task.opened)
    ]
    code = [inspect.getsource(module) for module in studies.MEASURED_BY]
    of_features = inspect.getsource(inspect.getmodule(find_features("pixels")))
    common = hashed(
        *(task.prompts, task.open_prompts, [0, 3, "pixels"], images, None),
        *(code, of_features, versions()),
    )
    sampler = {"temperature": 1.0, "compile": False, "top_k": None, "top_p": None}
    assert list(pipe.sampler_settings().items()) == list(sampler.items())
    guided = ["s", "", 3.0]
    assert plain.made_with == hashed(common, pipe.digest(), sampler, guided)
    assert other.made_with == hashed(common, pipe.digest(), sampler | {"top_k": 3}, guided)

    # a study that was written before goes on, and what is finished is not drawn again
    times = {own: own.stat().st_mtime_ns for own in out.rglob("cell.json")}
    held = json.loads((out / "study.json").read_text())
    for name in ("sampler", "branches"):
        held["variants"]["plain"].pop(name)
        held["study"]["variants"][0].pop(name)
    (out / "study.json").write_text(json.dumps(held))
    assert read_study(out / "study.json") == plan
    more = dataclasses.replace(plan, variants=(*plan.variants, Variant("0", sampler={"top_k": 1})))
    assert len(run(more, out, progress=False).cells) == 3
    assert all(own.stat().st_mtime_ns == then for own, then in times.items())
    assert read_study(out / "study.json") == more
    warm = dataclasses.replace(plan, variants=(Variant("cool", sampler={"top_k": 4}),))
    with pytest.raises(ValueError, match="differs in the variant 'cool'"):
        run(warm, out, progress=False)

    for text, message in (
        ("[top_k]", "sampler"),
        ("{3: 3}", "sampler"),
        ("{top_k: many}", "the variant 'cool': top_k is 'many', expected an int"),
    ):
        file.write_text(f"variants: [{{name: cool, sampler: {text}}}]\n")
        with pytest.raises(ValueError, match=message):
            read_study(file)


def test_an_error_of_ones_own_features_stops_the_study_and_keeps_no_failure(
    weights, tmp_path, monkeypatch
):
    module = tmp_path / "mine.py"
    module.write_text("def features(images):\n    return images.flatten(1)[:, :3]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    plan = Study(weights, families=("ar",), **{**SMALL, "features": "mine:features"})
    run(plan, tmp_path / "out", progress=False)
    module.write_text("def features(images):\n    return images\n")
    sys.modules.pop("mine")
    with pytest.raises(ValueError, match="features"):
        run(plan, tmp_path / "out", progress=False)
    # its code is part of what cells are made with
    module.write_text("def features(images):\n    return images.flatten(1)[:, :4]\n")
    sys.modules.pop("mine")
    assert all(own.failure is None for own in run(plan, tmp_path / "out", progress=False).cells)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n is 0, expected an int from 1"),
        ({"n": 10**9}, "n is 1000000000, expected an int from 1 to 1000000"),
        ({"draws": 10**12}, "draws is"),
        ({"seed": 2**70}, "seed is"),
        ({"open_prompts": ("a", "a")}, "open_prompts is .* expected none twice"),
        ({"scales": ()}, "scales is empty"),
        ({"scales": (1.0, 1.0)}, "none twice"),
        ({"variants": (Variant("a"), Variant("a", "2*s"))}, "none twice"),
        ({"variants": (Variant("x", scales=(7.0,)),)}, "has the scale 7, expected some of"),
        ({"variants": (Variant("x", "intervall(s, 0, 1)"),)}, "interval"),
        ({"variants": (Variant("x", mitigations="rescale(7)"),)}, "rescale"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Study(**values)


def test_a_study_is_read_from_yaml_and_from_a_finished_one(weights, tmp_path):
    file = tmp_path / "study.yaml"
    file.write_text(
        "n: 20\ndraws: 3\nfeatures: pixels\nscales: [1, 3]\nfamilies: [flow]\n"
        "variants:\n  - {name: plain}\n"
        '  - {name: decay, scale: "linear(s, 1)", mitigations: "rescale(0.7)", scales: [3]}\n'
        f"weights: {weights}\n"
    )
    plan = read_study(file)
    decay = Variant("decay", "linear(s, 1)", "rescale(0.7)", (3.0,))
    assert plan == Study(weights, variants=(Variant(), decay), families=("flow",), **SMALL)
    run(plan, tmp_path / "out", progress=False)
    assert read_study(tmp_path / "out" / "study.json") == plan
    odd = Study(weights, "x", scales=(1e30, 1e-7), open_prompts=("\U0001f600 tiger",))
    held = json.loads((tmp_path / "out" / "study.json").read_text())
    held["study"] = json.loads(json.dumps(dataclasses.asdict(odd)))
    (tmp_path / "odd.json").write_text(json.dumps(held))
    assert read_study(tmp_path / "odd.json") == odd
    for text, message in (
        ("m: 3\n", "unknown key 'm'"),
        ("variants: [{nam: x}]\n", "unknown key 'nam'"),
        ("- 3\n", "expected a mapping"),
        ("n: many\n", "n"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_study(file)


def test_real_images_show_what_captions_look_like(weights, tmp_path):
    """Data of one's own: a folder, in which nothing can be read back from the pixels."""
    folder = tmp_path / "data"
    folder.mkdir()
    scenes = make_shapes(120, size=16, wrong=0.0, two_objects=0.0)
    with (folder / "metadata.jsonl").open("w") as file:
        pictures = to_images(to_float(scenes.images))
        for i, (caption, picture) in enumerate(zip(scenes.captions, pictures, strict=True)):
            picture.save(folder / f"{i}.png")
            line = {"file_name": f"{i}.png", "text": caption, "split": "val" if i % 2 else "train"}
            file.write(json.dumps(line) + "\n")
    plan = Study(weights, str(folder), families=("flow",), **{**SMALL, "n": 60})
    results = run(plan, tmp_path / "out", progress=False)
    (first, _) = results.cells
    assert {"caption_top5", "caption_rank", "kid", "precision"} <= first.measures.keys()
    assert "attributes" not in first.measures
    real, wrong = (results.reference[k] for k in ("real images", "shuffled captions"))
    assert real["caption_rank"].value < wrong["caption_rank"].value - 5


def test_files_are_json_that_others_can_read(weights, tmp_path):
    out = tmp_path / "out"
    run(Study(weights, families=("ar",), **{**SMALL, "scales": (0.0,)}), out, progress=False)
    for file in out.rglob("*.json"):
        json.loads(file.read_text(), parse_constant=pytest.fail)


def run_cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return int(stop.value.code or 0)


def test_the_command_line_says_what_goes_together(prompts, capsys):
    for arguments, message in (
        (["compare"], "expected a PROMPT, --data or --study"),
        (["compare", "a cat", "--data", "shapes"], "PROMPT is 'a cat' with a study"),
        (["compare", "a cat", "--draws", "3"], "--draws is of a study"),
        (["compare", "a cat", "--mitigations", "rescale(0.7)"], "--mitigations is of a study"),
        (["compare", "--study", "none.yaml"], "no study at none.yaml"),
        (["compare", "--data", "shapes", "--schedules", "linea(s, 1)"], "linear"),
    ):
        assert run_cli(arguments) == 2
        assert message in capsys.readouterr().err
    assert expand_lists(["compare", "--schedules", "a(s)", "b", "--out", "x"]) == [
        *["compare", "--schedules", "a(s)", "--schedules", "b", "--out", "x"]
    ]


def test_an_empty_file_of_prompts_is_refused(tmp_path, weights, capsys):
    (tmp_path / "none.txt").write_text("\n \n")
    assert run_cli(["compare", "--data", str(tmp_path / "none.txt"), "--weights", weights]) == 2
    assert "is empty, expected one prompt a line" in capsys.readouterr().err


def test_the_python_of_the_page_on_comparing_runs():
    page = (Path(__file__).parent.parent / "docs/comparing.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    for block in blocks:
        held: dict = {}
        exec(compile(block, "comparing.md", "exec"), held)
        assert float(held["trace"].strength) > 0


def test_cells_of_weights_that_have_changed_are_no_longer_reported(tmp_path):
    folder, out = tmp_path / "weights", tmp_path / "out"
    for family in ("ar", "flow"):
        pipeline(family=family).save_pretrained(folder)
    plan = Study(str(folder), families=("ar", "flow"), **SMALL)
    assert len(run(plan, out, progress=False).cells) == 4
    pipeline(seed=1, family="flow").save_pretrained(folder)
    one = Study(str(folder), families=("flow",), **{**SMALL, "scales": (3.0,)})
    found = [own.cell for own in run(one, out, progress=False).cells]
    # the cell of flow at 1 is of the old weights
    assert Cell("flow", "plain", 1.0) not in found and Cell("flow", "plain", 3.0) in found


def test_a_study_file_can_be_narrowed_and_whole_numbers_are_the_same_scales(
    weights, tmp_path, capsys
):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(
        f"n: 20\ndraws: 0\nfeatures: pixels\nscales: [1, 3, 5]\nfamilies: [ar]\nweights: {weights}\n"
        'variants: [{name: plain}, {name: late, scale: "interval(s, 0.5, 1)", scales: [3, 5]}]\n'
    )
    run_cli(["compare", "--study", str(file), "--scales", "3", "--out", str(out)])
    times = {own: own.stat().st_mtime_ns for own in out.rglob("cell.json")}
    assert len(times) == 2
    run_cli(["compare", "--study", str(file), "--out", str(out)])
    assert all(own.stat().st_mtime_ns == then for own, then in times.items())
    assert len(Results.load(out).cells) == 5


def test_real_images_are_the_same_in_every_process():
    """Strings are hashed with another seed in each: nothing may follow the order of a set of them."""
    code = (
        "import hashlib; from unicfg.evaluation.tasks import read_task\n"
        "task = read_task('shapes', 4, 16, draws=16)\n"
        "print(hashlib.sha256(task.opened.numpy().tobytes()).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(found) == 1
