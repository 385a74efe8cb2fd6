"""Several processes train as one does: the same losses, each sample once, whole checkpoints whoever dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import training_worker
from safetensors.torch import load_file
from test_training import tiny_recipe, write_recipe

from unicfg.training.dropout import ConditionDropout, Part
from unicfg.training.optimize import fit
from unicfg.training.recipe import Optimization, load_recipe
from unicfg.training.trainer import train

FAMILIES = ["ar", "masked", "diffusion", "hybrid", "hybrid masked"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]
WORKER = os.path.join(os.path.dirname(__file__), "training_worker.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.path.dirname(WORKER)}


def losses(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def seen(folder, processes):
    """What each process noted."""
    files = [folder / f"seen-{i}.json" for i in range(processes)]
    return [json.loads(file.read_text()) for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes did, in one start of them, and what one did with the same."""
    out = tmp_path_factory.mktemp("runs")
    training_worker.run(out / "one", FAMILIES)
    muon = {"optimizer": "muon", "precision": "bfloat16"}
    training_worker.run(out / "one with muon", FAMILIES, **muon)
    runs = {
        "two": {},
        "sharded": {"shard": True},
        "accumulated": {"accumulate": 4},
        "sharded and accumulated": {"accumulate": 2, "shard": True, **muon},
        "two after one": {"resume_half_of": "one"},
        "two after sharded": {"resume_half_of": "sharded"},
        "sharded after two": {"resume_half_of": "two", "shard": True},
        "sharded again": {"resume_half_of": "sharded", "shard": True},
    }
    given = json.dumps({name: {"families": FAMILIES} | own for name, own in runs.items()})
    command = [*TORCHRUN, "2", WORKER, str(out), given]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    training_worker.run(out / "one after two", FAMILIES, resume_half_of="two")
    return out


@pytest.mark.parametrize("split", ["two", "sharded", "accumulated"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_train_as_one_with_the_same_batch(folder, split, family):
    """DDP, FSDP and gradient accumulation: the losses of every step, and what was learned, up to rounding."""
    assert losses(folder / split / family) == pytest.approx(
        losses(folder / "one" / family), rel=2e-4
    )
    expected = load_file(folder / "one" / family / "trained-0.safetensors")
    for process in range(2):  # both hold the same
        found = load_file(folder / split / family / f"trained-{process}.safetensors")
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if value.is_floating_point():
                torch.testing.assert_close(found[key], value, atol=2e-3, rtol=1e-2)


@pytest.mark.parametrize("split", ["two", "sharded", "accumulated"])
def test_each_sample_is_seen_once_and_draws_belong_to_its_place(folder, split):
    (whole,) = seen(folder / "one/ar", 1)
    parts = seen(folder / split / "ar", 2)
    passes = len(parts[0]["indices"]) // 6
    for step in range(6):
        for key in ("indices", "dropped"):
            rows = [
                row
                for part in parts
                for one_pass in part[key][step * passes : (step + 1) * passes]
                for row in one_pass
            ]
            assert rows == whole[key][step]
    in_epoch = [i for batch in whole["indices"][:3] for i in batch]
    assert sorted(in_epoch) == list(range(48))
    # what the two dropped differs, and so do the draws of the global generator
    assert parts[0]["dropped"] != parts[1]["dropped"]
    assert not set(parts[0]["noise"]) & set(parts[1]["noise"])


@pytest.mark.parametrize("family", FAMILIES)
def test_muon_bfloat16_sharding_and_accumulation_go_together(folder, family):
    assert losses(folder / "sharded and accumulated" / family) == pytest.approx(
        losses(folder / "one with muon" / family), rel=2e-2
    )


AGAIN = {
    "one after two": "two",
    "two after one": "one",
    "two after sharded": "sharded",
    "sharded after two": "two",
    "sharded again": "sharded",
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("resumed", AGAIN)
def test_a_checkpoint_resumes_in_another_number_of_processes(folder, resumed, family):
    """Sharded or not: the last three of six steps are done again, and no others."""
    before = losses(folder / AGAIN[resumed] / family)
    assert losses(folder / resumed / family) == pytest.approx(before, rel=2e-4)
    (first, *_) = seen(folder / resumed / family, 1)
    assert len(first["indices"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_resumes_as_if_never_stopped(folder, family):
    whole, again = (
        load_file(folder / run / family / "trained-0.safetensors")
        for run in ("sharded", "sharded again")
    )
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []


def test_a_learned_codebook_and_a_critic_train_in_two_processes(folder):
    """Not as in one: the codebook moves in every pass, the critic is balanced in every pass. But both hold the same."""
    one, two = (load_file(folder / f"tokenizer/trained-{i}.safetensors") for i in range(2))
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, two[key])
    assert all(loss == loss for loss in losses(folder / "tokenizer"))


def test_parts_of_a_batch_drop_what_the_whole_would(tmp_path):
    seen = []

    class Model(torch.nn.Module):
        def forward(self, x, cond):
            seen.append(cond[:, 0] == 0)

    wrapped = ConditionDropout(Model(), torch.zeros(1, dtype=torch.long), 0.5)
    cond = torch.ones(12, 1, dtype=torch.long)
    wrapped.reseed(3)
    wrapped(None, cond)
    for index in range(3):
        wrapped.reseed(3, Part(index, 3))
        wrapped(None, cond[:4])
    assert torch.equal(torch.cat(seen[1:]), seen[0]) and 0 < int(seen[0].sum()) < 12
    with pytest.raises(ValueError, match="index is 2, expected 0 to 1"):
        Part(2, 2)


def test_a_batch_that_cannot_be_split_is_refused(tmp_path):
    data = torch.utils.data.TensorDataset(torch.zeros(64, 3))
    settings = Optimization(steps=1, batch_size=10, accumulate=4)
    with pytest.raises(ValueError, match="batch_size is 10, expected a multiple of 4: 1 processes"):
        fit(torch.nn.Linear(3, 1), data, lambda *_: None, settings, tmp_path, tracker=False)
    few = torch.utils.data.TensorDataset(torch.zeros(3, 3))
    settings = Optimization(steps=1, batch_size=8, accumulate=4)
    with pytest.raises(ValueError, match="there are 3 samples, expected at least 4: 1 processes"):
        fit(torch.nn.Linear(3, 1), few, lambda *_: None, settings, tmp_path, tracker=False)


# whole trainings


def torchrun(file, *options):
    command = [*TORCHRUN, "2", "-m", "unicfg", "train", str(file), *options]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT
    )


def shards(folder):
    """All that the stages before the training have written, as numbers and texts."""
    found = {}
    for part in ("images", "codes"):
        for file in sorted((folder / part).rglob("*.json")):
            found[str(file.relative_to(folder))] = file.read_text()
        for file in sorted((folder / part).rglob("*.safetensors")):
            tensors = load_file(file)
            found[str(file.relative_to(folder))] = {k: v.tolist() for k, v in tensors.items()}
    return found


def test_a_lost_process_ends_the_run_and_resuming_equals_never_stopping(tmp_path):
    """Rank 1 is killed in the middle: the run ends with a message and a whole checkpoint, and --resume completes it."""
    plain = write_recipe(tmp_path, without_dropout(tiny_recipe(tmp_path / "plain", steps=40)))
    train(load_recipe(plain))
    whole = write_recipe(tmp_path, without_dropout(tiny_recipe(tmp_path / "whole", steps=40)))
    with torchrun(whole) as process:
        told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert told.count("training and") == 1  # one of them speaks
    assert losses(tmp_path / "whole/logs/ar") == pytest.approx(
        losses(tmp_path / "plain/logs/ar"), rel=1e-3
    )
    shutil.rmtree(tmp_path / "whole/codes")
    shutil.rmtree(tmp_path / "whole/tokenizer")
    shutil.copytree(tmp_path / "plain/tokenizer", tmp_path / "whole/tokenizer")
    with torchrun(whole, "--resume", "--until", "codes") as process:
        told, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "stopped after the stage codes" in told, told
    assert shards(tmp_path / "plain") == shards(tmp_path / "whole")  # whoever wrote them

    out = tmp_path / "lost"
    recipe = write_recipe(tmp_path, without_dropout(tiny_recipe(out, steps=40)))
    with torchrun(recipe) as process:
        checkpoint = out / "logs/ar/checkpoints/step-00000004.safetensors"
        began = time.monotonic()
        while not checkpoint.exists():
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.005)
        os.kill(rank_of(process.pid, 1), signal.SIGKILL)
        told, _ = process.communicate(timeout=120)
    assert process.returncode != 0
    print(told)
    # unless the launcher ended the other one before it could notice
    assert "another process has ended" in told or "Signal 15 (SIGTERM)" in told, told
    assert not (out / "ar/config.json").exists()
    with torchrun(recipe, "--resume") as process:
        told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    for name in (
        "ar/model",
        "logs/ar/checkpoints/step-00000040",
        "logs/tokenizer/checkpoints/step-00000040",
    ):
        a, b = (load_file(f / f"{name}.safetensors") for f in (tmp_path / "whole", out))
        assert [key for key in a if not torch.equal(a[key], b[key])] == []


def test_accelerate_launch_trains_what_the_recipe_says(tmp_path):
    """Two processes; precision and accumulation as the recipe has them, whatever accelerate was told."""
    values = without_dropout(tiny_recipe(tmp_path / "plain", steps=3))
    train(load_recipe(write_recipe(tmp_path, values)))
    file = write_recipe(tmp_path, values | {"out": str(tmp_path / "launched")})
    options = ["--num_processes", "2", "--multi_gpu", "--num_machines", "1"]
    told = ENVIRONMENT | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}
    options += ["--mixed_precision", "bf16"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "unicfg"]
    done = subprocess.run([*command, "train", str(file)], capture_output=True, text=True, env=told)
    assert done.returncode == 0, done.stderr
    for part in ("tokenizer", "ar"):
        for key in ("loss", "gradient_norm"):
            one, two = (losses(tmp_path / r / "logs" / part, key) for r in ("plain", "launched"))
            assert two == pytest.approx(one, rel=1e-3)
    # the last checkpoint of a process alone has other roundings than that of two
    a, b = (load_file(tmp_path / run / "ar/model.safetensors") for run in ("plain", "launched"))
    assert any(not torch.equal(a[key], b[key]) for key in a)


def without_dropout(values):
    """Draws of dropout in the network differ by process. Three rounds of images, so that both have some to read."""
    values["data"]["count"] = 4200
    values["model"]["dropout"] = 0.0
    values["tokenizer"]["flip"] = False
    return values


def rank_of(launcher, rank):
    """The process id of a rank."""
    for child in map(int, children(launcher)):
        with open(f"/proc/{child}/environ", "rb") as file:
            if f"\0RANK={rank}\0".encode() in b"\0" + file.read():
                return child
    raise AssertionError(f"no rank {rank} among {children(launcher)}")


def children(process):
    with open(f"/proc/{process}/task/{process}/children") as file:
        return re.findall(r"\d+", file.read())
