"""Kills at random moments, and full disks: nothing is corrupt, nothing finished is lost. Run by make test-slow.

Every number that decides when a process is killed comes from a seed, which a failing test prints.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import tiny_recipe, write_recipe
from tiny import CAPTIONS, pipeline

from models import TextToImage
from tokenizers_vq.files import read_json, read_tensors
from unicfg.evaluation.results import Results
from unicfg.training.checkpoint import Checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
UNICFG = [sys.executable, "-m", "unicfg"]


def check_whole(folder):
    """Every file that has its final name is whole; returns what is finished: {name: bytes}."""
    finished = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name.startswith("."):
            continue
        if file.suffix == ".safetensors":
            read_tensors(file)  # verifies the checksum
            finished[str(file.relative_to(folder))] = file.read_bytes()
        elif file.suffix == ".json":
            read_json(file)
    return finished


def kill_until_done(command, folder, kills, window, seed=0):
    """Run a command again and again, killed at random moments of its work, then to its end.

    Args:
        command: goes on where it was stopped.
        folder: that it writes to.
        kills: how many.
        window: seconds after a process's first sign of work in which its kill comes.
        seed: of the moments.

    Returns:
        how many kills found the process at work, and the steps at which trainings were taken up.
    """
    moments, starts = random.Random(seed), []
    for hits in range(kills):
        before, steps = check_whole(folder), newest_steps(folder)
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
        )
        began, started = time.time(), None
        kill_at = moments.uniform(0, window)
        while process.poll() is None and (started is None or time.time() < started + kill_at):
            time.sleep(0.002)
            if started is None and any(own.stat().st_mtime > began for own in existing(folder)):
                started = time.time()
        ended = process.poll()
        process.send_signal(signal.SIGKILL)
        told, _ = process.communicate()
        starts += re.findall(r"goes on from step (\d+)", told)
        after = check_whole(folder)
        lost = [name for name in before if before[name] != after.get(name)]
        # checkpoints are rotated, the newest one stays
        lost = [name for name in lost if "checkpoints" not in name]
        assert not lost, f"seed {seed}, after {hits} kills: {lost}"
        for stage, step in steps.items():
            assert newest_steps(folder)[stage] >= step, f"seed {seed}, after {hits} kills"
        if ended is not None:
            assert ended == 0, f"seed {seed}, after {hits} kills: {told}"
            return hits, starts
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    return kills, starts


def newest_steps(folder):
    """The step of the newest whole checkpoint of each stage."""
    found = {own: Checkpoints(own).load() for own in folder.glob("logs/*/checkpoints")}
    return {own: held[0] for own, held in found.items() if held is not None}


def existing(folder):
    """The files of a folder; some may go while they are listed."""
    return [own for own in folder.rglob("*") if own.is_file() and not own.name.endswith(".tmp")]


def uninterrupted(command):
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def same_tensors(one, two, pattern):
    """Whether all files of two folders hold bit-equal tensors."""
    files = sorted(file.relative_to(one) for file in one.glob(pattern))
    assert files and files == sorted(file.relative_to(two) for file in two.glob(pattern))
    for file in files:
        a, b = load_file(one / file), load_file(two / file)
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == [], file


@pytest.mark.parametrize("family", ["ar", "diffusion"])
def test_training_that_is_killed_at_random_ends_as_if_it_never_was(
    tmp_path, family, record_property
):
    """All stages, from the first image to the pipeline: bit-equal."""
    changes = {"checkpoint_every": 10, "sample_every": 80, "log_every": 5}
    commands = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        values = tiny_recipe(tmp_path / name, steps=400, **changes)
        values["data"]["count"] = 5000
        file = write_recipe(tmp_path / name, values)
        commands[name] = [*UNICFG, "train", str(file), "--family", family, "--resume"]
    uninterrupted(commands["whole"])
    hits, starts = kill_until_done(commands["killed"], tmp_path / "killed", kills=16, window=1.5)
    record_property("measured", f"{hits} kills, taken up at the steps {', '.join(starts)}")
    assert hits >= 10 and starts  # and not always from the start
    same_tensors(tmp_path / "whole", tmp_path / "killed", "**/model.safetensors")
    same_tensors(tmp_path / "whole", tmp_path / "killed", "**/step-00000400.safetensors")


def test_pre_encoding_that_is_killed_at_random_ends_as_if_it_never_was(tmp_path, record_property):
    commands = {}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        values = tiny_recipe(tmp_path / name, steps=1)
        values["data"]["count"] = 30_000
        file = write_recipe(tmp_path / name, values)
        commands[name] = [*UNICFG, "train", str(file), "--resume", "--until", "codes"]
    uninterrupted(commands["whole"])
    hits, _ = kill_until_done(commands["killed"], tmp_path / "killed", kills=16, window=2.5)
    record_property("measured", f"{hits} kills")
    assert hits >= 10
    for pattern in ("images/**/*.safetensors", "codes/**/*.safetensors"):
        same_tensors(tmp_path / "whole", tmp_path / "killed", pattern)


def test_a_study_that_is_killed_at_random_ends_as_if_it_never_was(tmp_path, record_property):
    for family in ("ar", "flow"):
        pipeline(family=family).save_pretrained(tmp_path / "weights")
    (tmp_path / "prompts.txt").write_text("\n".join(CAPTIONS))
    (tmp_path / "killed").mkdir()
    axes = ["--scales", *map(str, range(12)), "-n", "24", "--draws", "3", "--features", "pixels"]
    data = ["--data", str(tmp_path / "prompts.txt"), "--weights", str(tmp_path / "weights")]
    commands = {
        name: [*UNICFG, "compare", *data, *axes, "--out", str(tmp_path / name)]
        for name in ("whole", "killed")
    }
    uninterrupted(commands["whole"])
    hits, _ = kill_until_done(commands["killed"], tmp_path / "killed", kills=12, window=1.5)
    record_property("measured", f"{hits} kills")
    assert hits >= 6
    found = {}
    for name in commands:
        results = Results.load(tmp_path / name)
        found[name] = {
            str(own.cell): {k: v for k, v in own.measures.items() if k not in ("seconds", "rate")}
            for own in results.cells
        }
    assert len(found["whole"]) == 24 and repr(found["whole"]) == repr(found["killed"])


def test_saving_that_is_killed_at_random_leaves_whole_files(tmp_path, record_property):
    """A pipeline is saved again and again over itself, all weights one number: no file mixes two of them."""
    command = [sys.executable, str(Path(__file__).parent / "kill_worker.py"), str(tmp_path / "out")]
    moments, saved = random.Random(0), tmp_path / "out/saved"
    for kill in range(16):
        saved.unlink(missing_ok=True)
        process = subprocess.Popen([*command, str(1000 * kill)], env=ENVIRONMENT)
        while not saved.exists():
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        last = int(saved.read_text())
        assert last > 1000 * kill
        pipe = TextToImage.from_pretrained(tmp_path / "out", "ar")
        for part in (pipe.network, pipe.tokenizer):
            numbers = {own for p in part.parameters() for own in p.detach().unique().tolist()}
            assert len(numbers) == 1 and numbers.pop() in (last, last + 1), f"kill {kill}"
    record_property("measured", "16 kills")


@contextmanager
def small_disk(folder, kilobytes):
    """A file system of its own that can take so much."""
    folder.mkdir()
    options = f"size={kilobytes}k"
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [200, 1000, 1900, 2600])
def test_a_full_disk_is_one_line_and_with_more_room_the_run_goes_on(tmp_path, kilobytes):
    """Wherever the disk gets full: a sentence, whole files, and after that the end that a large disk would have had."""
    changes = {"checkpoint_every": 10, "sample_every": 40}
    whole = write_recipe(tmp_path, tiny_recipe(tmp_path / "whole", steps=40, **changes))
    uninterrupted([*UNICFG, "train", str(whole)])
    disk = tmp_path / "disk"
    file = write_recipe(tmp_path, tiny_recipe(disk / "run", steps=40, **changes))
    command = [*UNICFG, "train", str(file), "--resume"]
    with small_disk(disk, kilobytes):
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 2, done.stderr
        assert "could not write" in done.stderr and "No space left" in done.stderr
        assert "Traceback" not in done.stderr
        check_whole(disk)
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        uninterrupted(command)
        same_tensors(tmp_path / "whole", disk / "run", "**/model.safetensors")
