"""The comparison of families: every cell is what the pipeline draws alone, and the report says how."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny import CAPTIONS, FAMILIES, pipeline

from models import TextToImage
from unicfg import Guidance
from unicfg.cli import expand_lists, main
from unicfg.evaluation.comparison import compare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "tiny"
    for family in FAMILIES:
        pipeline(family=family).save_pretrained(out)
    return out


def test_every_cell_is_what_the_pipeline_draws(folder):
    seen = []
    result = compare(
        CAPTIONS[0],
        weights=str(folder),
        families=FAMILIES,
        scales=[1.0, 4.0],
        seeds=[3, 4],
        progress=lambda family, scale: seen.append((family, scale)),
    )
    assert seen == [(family, scale) for family in FAMILIES for scale in (1.0, 4.0)]
    for family in FAMILIES:
        pipe = TextToImage.from_pretrained(folder, family)
        for scale in (1.0, 4.0):
            alone = pipe([CAPTIONS[0]] * 2, seeds=[3, 4], guidance=Guidance(scale))
            for a, b in zip(alone, result.images[family, scale], strict=True):
                assert np.array_equal(np.asarray(a), np.asarray(b))
    # ten rows (families and seeds) of two cells and their labels
    width, height = result.picture().size
    assert width == 120 + 2 * 132 + 4 and height > 10 * 132


def test_a_report_holds_the_images_and_all_that_made_them(folder, tmp_path, capsys):
    out = tmp_path / "report"
    command = ["compare", CAPTIONS[1], "--weights", str(folder), "--seed", "5", "--out", str(out)]
    run([*command, "--scales", "1", "8", "--families", "ar", "flow"])
    assert f"the picture is in {out / 'compare.png'}" in capsys.readouterr().out
    settings = json.loads((out / "settings.json").read_text())
    assert settings["prompt"] == CAPTIONS[1] and settings["seeds"] == [5]
    assert settings["scales"] == [1.0, 8.0] and list(settings["families"]) == ["ar", "flow"]
    assert settings["families"]["flow"]["config"]["space"] == "flow"
    assert settings["families"]["flow"]["sampler"]["steps"] == 30
    assert settings["versions"].keys() == {"unicfg", "torch", "python"}
    flow = settings["families"]["flow"]
    assert {"spacing", "shift", "eta", "solver"} <= flow["sampler"].keys()
    assert flow["weights_sha256"] == TextToImage.from_pretrained(folder, "flow").digest()
    assert flow["weights_sha256"] != settings["families"]["ar"]["weights_sha256"]
    for file, what in settings["images"].items():
        pipe = TextToImage.from_pretrained(folder, what["family"])
        (image,) = pipe([CAPTIONS[1]], seeds=[5], guidance=Guidance(what["scale"]))
        with Image.open(out / file) as saved:
            assert np.array_equal(np.asarray(saved), np.asarray(image))
        assert file in (out / "index.html").read_text()


def run(arguments):
    with pytest.raises(SystemExit) as done:
        main(arguments)
    assert done.value.code == 0


def test_all_families_of_the_weights_are_the_rows(folder, tmp_path):
    run(
        [
            "compare",
            CAPTIONS[0],
            "--weights",
            str(folder),
            "--scales",
            "2",
            "--out",
            str(tmp_path / "a.png"),
        ]
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert 5 * 132 < picture.height < 6 * 132


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--families", "ar", "--weights", "nowhere"], "no pipeline at 'nowhere'"),
        (["--families", "gan"], "family is 'gan', expected one of ar, masked"),
        (["--families", "ar", "ar"], "expected at least one, and none twice"),
        (["--families", "ar", "gan"], "family is 'gan', expected one of ar, masked"),
        (["--scales", "1", "1"], "scales is"),
        (["--scales", "one"], "error: "),
        (["-n", "0"], "error: Invalid value for '-n'"),
        (["--scales", "inf"], "expected a finite number"),
        (["--out", "x.docx"], "suffix '.docx'"),
    ],
)
def test_bad_comparisons_are_refused_in_one_line(folder, options, message, capsys, tmp_path):
    weights = [] if "--weights" in options else ["--weights", str(folder)]
    out = [] if "--out" in options else ["--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit):
        main(["compare", CAPTIONS[0], *weights, *options, *out])
    shown = capsys.readouterr().err
    assert message in shown and len(shown.strip().splitlines()[-1:]) == 1
    assert "Traceback" not in shown and "│" not in shown
    assert not list(tmp_path.iterdir())


def test_a_folder_of_drawn_images_is_not_written_over(folder, tmp_path, capsys):
    out = tmp_path / "images"
    drawn = ["generate", "a red circle", "--weights", str(folder), "-n", "1", "--out", str(out)]
    compared = ["compare", "a red circle", "--weights", str(folder), "--scales", "1"]
    for arguments, code in ((drawn, 0), ([*compared, "--out", str(out)], 2), (drawn, 0)):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == code
    assert "holds images of unicfg generate, expected another folder" in capsys.readouterr().err


def test_scales_that_print_alike_have_images_of_their_own(folder, tmp_path):
    scales = [1.0, 1.0000001]
    compare(CAPTIONS[0], weights=folder, families=["ar"], scales=scales).save(tmp_path / "r")
    settings = json.loads((tmp_path / "r/settings.json").read_text())
    assert [image["scale"] for image in settings["images"].values()] == scales


def test_a_file_is_no_folder_for_a_report(tmp_path, capsys):
    (tmp_path / "afile").touch()
    with pytest.raises(SystemExit):
        main(["compare", "x", "--out", str(tmp_path / "afile")])
    assert "afile, a file: expected a folder" in capsys.readouterr().err


def test_a_family_that_the_weights_do_not_hold(tmp_path, capsys):
    pipeline().save_pretrained(tmp_path / "w")
    with pytest.raises(SystemExit):
        main(["compare", "x", "--weights", str(tmp_path / "w"), "--families", "flow"])
    assert "holds the families ar, not flow" in capsys.readouterr().err


def test_lists_on_the_command_line_end_where_their_values_end():
    arguments = [
        "compare",
        "--families",
        "ar",
        "flow",
        "--scales",
        "1",
        "2",
        "a cat",
        "--seed",
        "3",
    ]
    assert expand_lists(arguments) == [
        *["compare", "--families", "ar", "--families", "flow", "--scales", "1", "--scales", "2"],
        *["a cat", "--seed", "3"],
    ]


def test_one_prompt_is_drawn_by_one_process(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("unicfg.cli.join_processes", lambda: SimpleNamespace(num_processes=2))
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a red circle", "--out", str(tmp_path / "x.png")])
    assert stop.value.code == 2 and "a PROMPT with 2 processes" in capsys.readouterr().err
