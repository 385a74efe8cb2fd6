"""Many images into a folder: the same files by any number of processes, whatever is killed, and nothing is drawn twice."""

import json
import math
import multiprocessing
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import CAPTIONS, pipeline

from models import TextToImage
from unicfg import Guidance, cli, generation
from unicfg.evaluation.tasks import read_task
from unicfg.generation import _Grid, draw_folder, is_whole
from unicfg.guidance import branches
from unicfg.training.data import read_folder

SMALL_BATCH = 8


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    out = tmp_path_factory.mktemp("weights") / "tiny"
    for family in ("ar", "flow"):
        pipeline(family=family).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def pipe(weights):
    return TextToImage.from_pretrained(weights, "ar")


@pytest.fixture(autouse=True)
def one_thread():
    """As the processes that tests start have it: with another number floats round otherwise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(generation, "BATCH", SMALL_BATCH)


def files(out: Path) -> dict[str, bytes]:
    """All that a folder holds but its settings, which say who drew it."""
    held = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    held.pop("settings.json", None)
    return held


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]


def times(out: Path) -> dict[Path, int]:
    return {own: own.stat().st_mtime_ns for own in out.glob("s*/*.png")}


def test_every_prompt_scale_and_seed_is_a_file_that_says_what_it_is(pipe, tmp_path, small_batches):
    out = tmp_path / "images"
    prompts, seeds, scales = CAPTIONS[:3], range(5, 9), [10.0, 1.0, 2.5]
    count = draw_folder(pipe, prompts, out, n=4, seed=5, scales=scales, command="unicfg generate x")
    assert count == 36 == len(list(out.rglob("*.png"))) == len(lines(out))
    assert (out / "s02.5/000002-ATigerIn3dStyle-seed000007.png").is_file()
    names = [line["file_name"] for line in lines(out)]
    assert names == sorted(names)
    expected = [(s, text, seed) for s in sorted(scales) for text in prompts for seed in seeds]
    assert [(line["scale"], line["text"], line["seed"]) for line in lines(out)] == expected
    for line in lines(out):
        (alone,) = pipe([line["text"]], seeds=[line["seed"]], guidance=Guidance(line["scale"]))
        with Image.open(out / line["file_name"]) as drawn:
            assert np.array_equal(np.asarray(drawn), np.asarray(alone))
    settings = json.loads((out / "settings.json").read_text())
    assert settings["weights_sha256"] == pipe.digest() and settings["family"] == "ar"
    assert settings["sampler"]["temperature"] == 1.0 and settings["seed"] == 5
    assert settings["prompts"] == prompts and settings["commands"] == ["unicfg generate x"]
    assert settings["guidance"]["2.5"] == repr(Guidance(2.5))
    assert settings["versions"]["torch"] == torch.__version__


def test_the_folder_is_a_data_set(pipe, tmp_path):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS, out, n=3, scales=[0.0, 3.0])
    held = read_folder(out, 16, progress=False)
    assert len(held) == 24 and held.skipped == ()
    assert held.captions == [text for _ in range(2) for text in CAPTIONS for _ in range(3)]
    assert held.attributes[-1] == {"family": "ar", "scale": 3.0, "seed": 2}
    drawn = pipe([CAPTIONS[3]], seeds=[2], guidance=Guidance(3.0))[0]
    assert np.array_equal(held.images[-1].permute(1, 2, 0).numpy(), np.asarray(drawn))
    task = read_task(str(out), 10, 16, draws=0)
    assert set(task.prompts) <= set(CAPTIONS) and len(task.prompts) == 10


def test_names_hold_no_word_that_a_library_takes_for_a_split():
    text = "train, a test of 3 val ünï"
    own = generation._Picture(7, text, -1.5, 2)
    assert own.file == "s-1.5/000007-TrainATestOf3ValN-seed000002.png"
    assert generation._Picture(7, "虎", 2.0, 12).file == "s02/000007-seed000012.png"
    assert len({generation._Picture(0, "x", s, 0).file for s in (1.0, 1.0000001, 10.0)}) == 3


def test_batches_hold_every_image_once_and_are_told_without_making_all_of_them():
    numbers = {f"prompt {i}": i for i in range(70)}
    grid = _Grid(numbers, (1.0, 3.0), 5, 7)
    batches = list(grid.batches())
    assert sorted(own for batch in batches for own in batch) == sorted(grid)
    assert all(len({own.scale for own in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 64
    # with more seeds, and with more prompts, what was full stays as it was
    of_one_scale = [batch for batch in batches if batch[0].scale == 1.0]
    more_seeds = list(_Grid(numbers, (1.0,), 5, 9).batches())
    assert of_one_scale[:7] == more_seeds[:7]
    more_prompts = _Grid(numbers | {"another": 70}, (1.0,), 5, 7).batches()
    assert of_one_scale[:7] == list(more_prompts)[:7]
    huge = _Grid({"x": 0}, (1.0,), 0, 10**15)
    assert [own.seed for own in next(huge.batches())] == list(range(64))


def test_what_is_whole_is_kept_and_what_is_not_is_drawn_again(pipe, tmp_path, small_batches):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS, out, n=5)
    before, then = files(out), times(out)
    first, second, third, *others = sorted(then)
    first.unlink()
    second.write_bytes(second.read_bytes()[:-3])
    third.write_bytes(b"")
    (out / "metadata.jsonl").write_text("{}")
    leftovers = [out / "s03" / ".x.png.123.tmp", out / ".metadata.jsonl.123.tmp"]
    for leftover in leftovers:
        leftover.write_text("half")
    assert not any(map(is_whole, (first, second, third))) and all(map(is_whole, others))
    calls, real = [], pipe.sample
    pipe.sample = lambda prompts, **more: calls.append(prompts) or real(prompts, **more)
    try:
        assert draw_folder(pipe, CAPTIONS, out, n=5) == 20
        # only the batches that they are of
        assert len(calls) == 2 and all(len(prompts) == SMALL_BATCH for prompts in calls)
        assert draw_folder(pipe, CAPTIONS, out, n=5) == 20 and len(calls) == 2
    finally:
        del pipe.sample
    assert files(out) == before
    assert all(own.stat().st_mtime_ns == then[own] for own in others)


def test_a_folder_grows_by_seeds_prompts_and_scales(pipe, tmp_path, small_batches):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS[1:3], out, n=2, scales=[3.0], command="first")
    for more, count in (
        ({"n": 4, "scales": [3.0]}, 8),
        ({"n": 4, "scales": [1.0]}, 16),
        ({"n": 2, "scales": [3.0]}, 16),  # less is there already
    ):
        then = times(out)
        assert draw_folder(pipe, CAPTIONS[1:3], out, **more, command="again") == count
        assert times(out).items() >= then.items() and len(lines(out)) == count
    # in another order, with another prompt, and only some of the seeds: numbers stay
    then = times(out)
    assert draw_folder(pipe, [CAPTIONS[0], CAPTIONS[2]], out, n=1, scales=[3.0]) == 17
    assert times(out).items() >= then.items()
    names = [line["file_name"] for line in lines(out)]
    assert names == sorted(names) and "s03/000002-ARedCircle-seed000000.png" in names
    settings = json.loads((out / "settings.json").read_text())
    assert settings["prompts"] == [CAPTIONS[1], CAPTIONS[2], CAPTIONS[0]]
    assert settings["scales"] == [1.0, 3.0] and settings["n"] == 4
    assert settings["commands"] == ["first", "again"]
    # all of it at once gives the same
    assert draw_folder(pipe, settings["prompts"], out, n=4, scales=[1.0, 3.0]) == 24
    draw_folder(pipe, settings["prompts"], tmp_path / "once", n=4, scales=[1.0, 3.0])
    assert files(out) == files(tmp_path / "once")


def test_metadata_names_what_a_larger_run_has_left(pipe, tmp_path, monkeypatch, small_batches):
    out, real = tmp_path / "images", pipe.sample
    done = []

    def stops(prompts, **more):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(prompts)
        return real(prompts, **more)

    monkeypatch.setattr(pipe, "sample", stops)
    with pytest.raises(KeyboardInterrupt):
        draw_folder(pipe, CAPTIONS[:1], out, n=100)
    monkeypatch.undo()
    assert not (out / "metadata.jsonl").exists()
    assert draw_folder(pipe, CAPTIONS[:1], out, n=3) == 2 * SMALL_BATCH
    assert [line["seed"] for line in lines(out)] == list(range(2 * SMALL_BATCH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, r"differ in seed \(0 there, 1 here\): expected another folder"),
        ({"temperature": 0.5}, r"sampler.temperature \(1.0 there, 0.5 here\)"),
        ({"top_k": 3}, r"sampler.top_k \(None there, 3 here\)"),
        ({"guidance": lambda s: Guidance(s / 2)}, r"guidance.3 \("),
        (
            {
                "guidance": lambda s: Guidance(branches.negative(s, 1.0)),
                "branches": {"negative": "x"},
            },
            r"branches.negative \(None there, 'x' here\)",
        ),
    ],
)
def test_another_run_is_refused_with_what_differs(pipe, tmp_path, changes, message):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS[:1], out, n=2)
    before = files(out) | {"settings.json": (out / "settings.json").read_bytes()}
    with pytest.raises(ValueError, match=message):
        draw_folder(pipe, CAPTIONS, out, **{"n": 3} | changes)
    assert files(out) | {"settings.json": (out / "settings.json").read_bytes()} == before


def test_other_weights_families_and_versions_are_refused(pipe, weights, tmp_path, monkeypatch):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS[:1], out, n=1)
    flow = TextToImage.from_pretrained(weights, "flow")
    with pytest.raises(ValueError, match=r"family \('ar' there, 'flow' here\).* and \d+ more"):
        draw_folder(flow, CAPTIONS[:1], out, n=1)
    with pytest.raises(ValueError, match=r"weights_sha256 \('\w+\.\.\. there"):
        draw_folder(pipeline(seed=1), CAPTIONS[:1], out, n=1)
    monkeypatch.setattr(generation, "versions", lambda: {"torch": "9"})
    with pytest.raises(ValueError, match=r"versions.torch \('.*' there, '9' here\)"):
        draw_folder(pipe, CAPTIONS[:1], out, n=1)


def test_a_folder_with_something_else_is_refused(pipe, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes is there and holds no drawn images"):
        draw_folder(pipe, CAPTIONS, tmp_path / "notes", n=1)
    with pytest.raises(ValueError, match=r"mine.txt is there and holds no drawn images"):
        draw_folder(pipe, CAPTIONS, tmp_path / "notes" / "mine.txt", n=1)
    for text in ('{"prompt": "a report of compare"}', "[1]", "{"):
        (tmp_path / "notes" / "settings.json").write_text(text)
        with pytest.raises(ValueError, match="is not the settings of drawn images"):
            draw_folder(pipe, CAPTIONS, tmp_path / "notes", n=1)
    assert sorted(own.name for own in tmp_path.rglob("*.*")) == ["mine.txt", "settings.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"prompts": [[1]]}, r"prompts holds \[1\], expected texts"),
        ({"prompts": []}, "prompts is empty"),
        ({"scales": ["x"]}, "one of scales is 'x'"),
        ({"scales": [math.nan]}, "one of scales is nan"),
        ({"scales": [10**400]}, "one of scales is 1000"),
        ({"n": True}, "n is True"),
        ({"n": math.nan}, "n is nan"),
        ({"seed": "0"}, "seed is '0'"),
        ({"commands": [{}]}, "commands is"),
        ({"guidance": {"3": 3}}, "guidance is"),
    ],
)
def test_settings_that_are_damaged_are_refused(pipe, tmp_path, changes, message):
    out = tmp_path / "images"
    draw_folder(pipe, CAPTIONS[:1], out, n=1)
    file = out / "settings.json"
    held = json.loads(file.read_text())
    assert held["format_version"] == 1
    file.write_text(json.dumps(held | changes))
    with pytest.raises(ValueError, match=rf"settings\.json is not the settings .*{message}"):
        draw_folder(pipe, CAPTIONS[:1], out, n=1)
    del held["format_version"]  # an older release wrote none
    file.write_text(json.dumps(held))
    assert draw_folder(pipe, CAPTIONS[:1], out, n=1) == 1
    nested = '{"a": ' * 900 + "1" + "}" * 900
    file.write_text(json.dumps(held)[:-1] + f', "x": {nested}}}')
    with pytest.raises(ValueError, match=r"settings\.json .* is nested too deeply"):
        draw_folder(pipe, CAPTIONS[:1], out, n=1)


def test_a_run_that_drew_nothing_binds_no_other(pipe, tmp_path):
    out = tmp_path / "images"
    with pytest.raises(ValueError, match="top_p"):
        draw_folder(pipe, CAPTIONS[:1], out, n=1, top_p=7.0)
    assert draw_folder(pipe, CAPTIONS[:1], out, n=1, top_p=0.7) == 1
    # nor is a folder someone else's in which a killed run was just writing its settings
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".settings.json.1.tmp").write_text("{")
    assert draw_folder(pipe, CAPTIONS[:1], tmp_path / "new", n=1) == 1
    assert not list((tmp_path / "new").glob(".*"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": "a cat"}, "prompts is 'a cat', expected a list"),
        ({"prompts": ["a", "b", "a"]}, "prompts holds 'a' twice"),
        ({"scales": []}, "scales is empty"),
        ({"scales": [1, 1.0]}, "scales holds 1.0 twice"),
        ({"scales": [math.inf]}, "finite"),
        ({"n": 0}, "n is 0, expected an int from 1"),
        ({"n": True}, "n is True"),
        ({"seed": 2**63}, "seed is"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"scheduler": object()}, "scheduler is a object, expected what can be written"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(pipe, tmp_path, values, message):
    out = tmp_path / "images"
    arguments = {"prompts": ["a"], "n": 1} | values
    with pytest.raises(ValueError, match=message):
        draw_folder(pipe, arguments.pop("prompts"), out, **arguments)
    assert not out.exists()


def test_more_prompts_than_can_be_read_back_are_refused_before_they_are_drawn(
    pipe, tmp_path, monkeypatch
):
    monkeypatch.setattr(generation, "MOST_SETTINGS_BYTES", 50_000)
    with pytest.raises(ValueError, match=r"prompts are 9000, of \d+ bytes .* several folders"):
        draw_folder(pipe, [f"prompt {i}" for i in range(9000)], tmp_path / "images", n=1)
    assert not (tmp_path / "images").exists()


def test_images_and_masks_are_told_apart(weights, tmp_path):
    flow = TextToImage.from_pretrained(weights, "flow")
    out, mask = tmp_path / "images", Image.new("L", (16, 16), 255)
    red, blue = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    more = {"n": 1, "steps": 2, "mask": mask}
    draw_folder(flow, CAPTIONS[:1], out, init_image=red, **more)
    assert draw_folder(flow, CAPTIONS[:2], out, init_image=red.copy(), **more) == 2
    with pytest.raises(ValueError, match=r"sampler\.init_image"):
        draw_folder(flow, CAPTIONS[:1], out, init_image=blue, **more)
    with pytest.raises(ValueError, match=r"sampler\.mask"):
        draw_folder(
            flow, CAPTIONS[:1], out, init_image=red, **more | {"mask": torch.ones(16, 16).bool()}
        )


def test_images_that_are_not_finite_end_the_run(weights, tmp_path):
    flow, out = TextToImage.from_pretrained(weights, "flow"), tmp_path / "images"
    next(flow.tokenizer.decoder.parameters()).data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the decoded images are not finite"):
        draw_folder(flow, CAPTIONS[:1], out, n=1, steps=2)
    assert not list(out.rglob("*.png"))


def test_a_full_disk_is_an_error_and_finished_images_stay(pipe, tmp_path, small_batches):
    out, real, whole = tmp_path / "images", pipe.sample, resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def fills(*arguments, **more):
        images = real(*arguments, **more)
        calls.append(len(images))
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, whole[1]))
        return images

    pipe.sample = fills
    try:
        with pytest.raises(OSError, match=r"could not write .*png: .*File too large; what is fin"):
            draw_folder(pipe, CAPTIONS, out, n=6, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        del pipe.sample
    left = [own for own in out.rglob("*") if own.is_file()]
    assert len(left) == SMALL_BATCH + 1  # and the settings
    assert all(is_whole(own) for own in left if own.suffix == ".png")
    assert draw_folder(pipe, CAPTIONS, out, n=6) == 24


def start(
    weights: Path,
    out: Path,
    *,
    n: int,
    count: int = 1,
    pause: float = 0.0,
    prompts: Sequence[str] = CAPTIONS,
) -> list[multiprocessing.process.BaseProcess]:
    """Processes of one run, without an agent that would end the others where one is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["unicfg.cli"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "prompts.txt").write_text("\n".join(prompts))
    own = [
        context.Process(target=drawing, args=(weights, out, n, rank, count, port, pause))
        for rank in range(count)
    ]
    for process in own:
        process.start()
    return own


def drawing(
    weights: Path, out: Path, n: int, rank: int, count: int, port: int, pause: float
) -> None:
    """What one process of a run does; ``pause`` seconds before a file takes its place."""
    said = os.open(out.parent / f"said-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    torch.set_num_threads(1)
    if count > 1:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ.update(address | ranks)
    generation.BATCH = SMALL_BATCH
    real, written = os.replace, []

    def slowly(here, there):
        time.sleep(pause)
        written.append(there)
        real(here, there)

    generation.os.replace = slowly
    options = ["-n", str(n), "--scales", "1", "3", "--weights", str(weights), "--out", str(out)]
    try:
        cli.main(["generate", "--prompts", str(out.parent / "prompts.txt"), *options])
    finally:
        print("wrote", sum(str(own).endswith(".png") for own in written), "images", flush=True)


def ended(processes: list[multiprocessing.process.BaseProcess]) -> list[int | None]:
    for process in processes:
        process.join(60)
        if process.is_alive():  # none is left behind by a test that fails
            process.kill()
    return [process.exitcode for process in processes]


def wait_for_images(out: Path, count: int) -> None:
    until = time.monotonic() + 60
    while len(list(out.rglob("*.png"))) < count:
        assert time.monotonic() < until, "no images came"
        time.sleep(0.005)


def test_a_killed_run_goes_on_where_it_was(pipe, weights, tmp_path, small_batches):
    out = tmp_path / "run" / "images"
    (process,) = start(weights, out, n=5, pause=0.02)
    wait_for_images(out, 11)
    process.kill()
    assert ended([process]) == [-signal.SIGKILL]
    then = times(out)
    assert 11 <= len(then) < 40 and all(map(is_whole, then))
    assert not (out / "metadata.jsonl").exists()
    assert ended(start(weights, out, n=5)) == [0]
    assert "40 images are in" in (out.parent / "said-0").read_text()
    draw_folder(pipe, CAPTIONS, tmp_path / "once", n=5, scales=[1.0, 3.0])
    assert files(out) == files(tmp_path / "once")
    assert times(out).items() >= then.items()


def test_a_process_that_dies_ends_the_run_and_the_next_one_completes_it(
    pipe, weights, tmp_path, small_batches
):
    out = tmp_path / "run" / "images"
    processes = start(weights, out, n=5, count=2, pause=0.02)
    wait_for_images(out, 11)
    processes[1].kill()
    # the other draws its share and finds then that nobody is there to wait for
    assert ended(processes) == [2, -signal.SIGKILL]
    said = (out.parent / "said-0").read_text()
    assert "error: another process of the run has ended: the same run again goes on" in said
    assert "Traceback" not in said
    then = times(out)
    assert 11 <= len(then) < 40
    # and by more processes than there are batches left
    assert ended(start(weights, out, n=5, count=3)) == [0, 0, 0]
    draw_folder(pipe, CAPTIONS, tmp_path / "once", n=5, scales=[1.0, 3.0])
    assert files(out) == files(tmp_path / "once")
    assert times(out).items() >= then.items()


def test_processes_share_the_images(pipe, weights, tmp_path, small_batches):
    out = tmp_path / "run" / "images"
    # batches of 8 and 4 at each scale: in turns, one process would have the large ones
    assert ended(start(weights, out, n=3, count=2)) == [0, 0]
    said = [(out.parent / f"said-{rank}").read_text() for rank in range(2)]
    assert ["wrote 12 images" in own for own in said] == [True, True]
    assert ["24 images are in" in own for own in said] == [True, False]
    draw_folder(pipe, CAPTIONS, tmp_path / "once", n=3, scales=[1.0, 3.0])
    assert files(out) == files(tmp_path / "once")


def test_there_may_be_more_processes_than_images(pipe, weights, tmp_path):
    out = tmp_path / "run" / "images"
    assert ended(start(weights, out, n=1, count=3, prompts=CAPTIONS[:1])) == [0, 0, 0]
    draw_folder(pipe, CAPTIONS[:1], tmp_path / "once", n=1, scales=[1.0, 3.0])
    assert files(out) == files(tmp_path / "once") and len(lines(out)) == 2


def test_processes_share_an_error_of_the_first(weights, tmp_path):
    out = tmp_path / "run" / "images"
    out.mkdir(parents=True)
    (out / "mine.txt").touch()
    assert ended(start(weights, out, n=1, count=3)) == [2, 2, 2]
    for rank in range(3):
        said = (out.parent / f"said-{rank}").read_text()
        assert "holds no drawn images" in said and "Traceback" not in said


def run_cli(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    return int(stop.value.code or 0)


def test_the_command_line_draws_into_a_folder_what_it_draws_into_a_picture(
    weights, tmp_path, capsys
):
    command = ["generate", CAPTIONS[0], "--weights", str(weights), "-n", "2", "--scale", "2"]
    command += ["--negative", "a blue square", "--away", "0.5", "--top-k", "9"]
    out = tmp_path / "v1.5"
    out.mkdir()  # a folder that is there is one, whatever its name
    assert run_cli([*command, "--out", str(out)]) == 0
    assert f"2 images are in {out}" in capsys.readouterr().out
    assert run_cli([*command, "--out", str(tmp_path / "x.png")]) == 0
    with Image.open(tmp_path / "x.png") as sheet:
        picture = np.asarray(sheet)
    for i, line in enumerate(lines(out)):
        with Image.open(out / line["file_name"]) as drawn:
            big = np.asarray(drawn.resize((128, 128), Image.Resampling.NEAREST))
        x, y = 124 + i * 132, 26
        assert np.array_equal(picture[y : y + 128, x : x + 128], big)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["branches"] == {"negative": "a blue square"}
    assert settings["sampler"]["top_k"] == 9
    assert settings["commands"][0].startswith("unicfg ")


@pytest.mark.parametrize("option", ["init-image", "mask"])
@pytest.mark.parametrize("kind", ["bomb", "truncated", "text", "nothing"])
def test_pictures_that_cannot_be_read_are_named(tmp_path, weights, capsys, option, kind):
    file, whole = tmp_path / "x.png", tmp_path / "whole.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(whole)
    content = whole.read_bytes()
    if kind == "bomb":
        head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + content[24:29]
        content = content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]
    elif kind == "truncated":
        content = content[: len(content) // 2]
    elif kind == "text":
        content = b"no picture"
    if kind != "nothing":
        file.write_bytes(content)
    both = {"init-image": whole, "mask": whole} | {option: file}
    command = ["generate", "x", "--weights", str(weights), "--family", "flow"]
    command += ["--init-image", str(both["init-image"]), "--mask", str(both["mask"])]
    assert run_cli([*command, "--out", str(tmp_path / "out.png")]) == 2
    said = capsys.readouterr().err
    assert f"error: --{option}" in said and "x.png" in said and "Traceback" not in said


def test_a_file_is_no_folder(tmp_path, weights, capsys):
    (tmp_path / "afile").touch()
    arguments = ["generate", "x", "--weights", str(weights), "--out", str(tmp_path / "afile")]
    assert run_cli(arguments) == 2
    assert "afile, a file: expected a folder" in capsys.readouterr().err


def test_several_processes_do_not_write_one_picture(tmp_path, weights, monkeypatch, capsys):
    monkeypatch.setattr(cli, "join_processes", lambda: SimpleNamespace(num_processes=2))
    out = tmp_path / "x.png"
    assert run_cli(["generate", "x", "--weights", str(weights), "--out", str(out)]) == 2
    assert "x.png, a picture, with 2 processes: expected a folder" in capsys.readouterr().err
    assert not out.exists()


def test_an_interrupted_command_says_how_to_go_on(tmp_path, weights, monkeypatch, capsys):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(TextToImage, "sample", interrupted)
    arguments = ["generate", "x", "--weights", str(weights), "--out", str(tmp_path / "images")]
    assert run_cli(arguments) == 130
    assert "interrupted: the same command goes on from there" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_no_kill_at_any_moment_costs_a_finished_image(
    pipe, weights, tmp_path, small_batches, count, record_property
):
    """At random moments, one process or all of them: while they start, while they draw, and when all is drawn."""
    moments, n, kills, done = random.Random(count), 40, 0, 0
    draw_folder(pipe, CAPTIONS, tmp_path / "once", n=n, scales=[1.0, 3.0])
    expected = files(tmp_path / "once")
    while kills < 12 or not done:
        out = tmp_path / f"run-{done}" / "images"
        then = times(out)
        processes = start(weights, out, n=n, count=count, pause=0.002)
        if moments.random() < 0.8:
            more = len(then) + moments.randint(1, 80)
            while len(times(out)) < more and any(process.is_alive() for process in processes):
                time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.5))
        hit = moments.sample(processes, moments.randint(1, count))
        kills += any(process.is_alive() for process in hit)
        for process in hit:
            process.kill()
        if any(process.exitcode != 0 for process in hit):
            time.sleep(moments.uniform(0.0, 0.3))
            for process in processes:
                process.terminate()  # as an agent like torchrun ends the others
        codes = ended(processes)
        now = times(out)
        assert now.items() >= then.items(), "a finished image is lost or was drawn again"
        for own in now:
            assert own.read_bytes() == expected[str(own.relative_to(out))]
        if all(code == 0 for code in codes):
            assert files(out) == expected
            done += 1
    record_property("measured", f"{kills} kills")


@pytest.mark.slow
def test_torchrun_draws_the_same_files_and_ends_where_a_process_dies(weights, tmp_path):
    prompts, script = tmp_path / "prompts.txt", tmp_path / "dies.py"
    prompts.write_text("\n".join(CAPTIONS))
    script.write_text(
        "import os, signal, sys\n"
        "from unicfg import cli, generation\n"
        "real, drawn = generation.to_images, []\n"
        "def to_images(images):\n"
        "    drawn.append(images)\n"
        "    if os.environ['RANK'] == '1' and len(drawn) == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(images)\n"
        "generation.to_images = to_images\n"
        "cli.main(sys.argv[1:])\n"
    )
    options = ["generate", "--prompts", prompts, "-n", "40", "--scales", "1", "3"]
    options += ["--weights", weights, "--family", "flow", "--steps", "3"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]

    def torchrun(*what):
        return subprocess.run(
            [sys.executable, *launch, *what, *options, "--out", tmp_path / "two"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            capture_output=True,
            text=True,
            timeout=240,
        )

    died = torchrun(script)
    assert died.returncode != 0 and "Signal 9 (SIGKILL)" in died.stderr
    then = times(tmp_path / "two")
    assert 64 <= len(then) < 320 and all(map(is_whole, then))
    done = torchrun("-m", "unicfg")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("320 images are in") == 1
    assert times(tmp_path / "two").items() >= then.items()
    run_cli([*map(str, options), "--out", str(tmp_path / "one")])
    assert files(tmp_path / "two") == files(tmp_path / "one")
    settings = json.loads((tmp_path / "two" / "settings.json").read_text())
    assert settings["machine"]["processes"] == 2 and settings["sampler"]["steps"] == 3
