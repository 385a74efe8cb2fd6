"""Training: recipes, the loop, checkpoints, resuming, and a model that learns to draw what it saw."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from accelerate.utils import set_seed
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from models import TextToImage
from models.folders import held_families
from tokenizers_vq import VQTokenizer
from tokenizers_vq.files import write_atomically
from unicfg import Guidance
from unicfg.cli import main
from unicfg.training.checkpoint import Checkpoints, restore_training_state, training_state
from unicfg.training.optimize import EpochBatches, MetricsLog, fit, learning_rate, make_optimizers
from unicfg.training.recipe import ModelRecipe, Optimization, Recipe, load_recipe
from unicfg.training.shapes import make_shapes
from unicfg.training.shards import Shards
from unicfg.training.sources import Entry, open_source
from unicfg.training.trainer import (
    _tokenizer_config,
    _TokenizerLoss,
    train,
)

TINY = {
    "data": {"source": "shapes", "image_size": 16, "count": 40, "validation": 0.2},
    "tokenizer": {"factor": 4, "width": 16, "depth": 1, "levels": [5, 5, 5]},
    "text": {"vocabulary": 280, "length": 12},
    "model": {"width": 32, "depth": 2, "heads": 4, "dropout": 0.1, "condition_dropout": 0.3},
}
TINY["model"] |= {"crops": 2, "shift": 1}
SCHEDULE = {
    "batch_size": 8,
    "log_every": 1,
    "sample_every": 100,
    "checkpoint_every": 2,
    "warmup": 2,
}


def tiny_recipe(out, steps=4, **changes):
    values = json.loads(json.dumps(TINY)) | {"out": str(out)}
    for part in ("tokenizer", "model"):
        values[part]["training"] = SCHEDULE | {"steps": steps} | changes
    return values


def write_recipe(folder, values):
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def run(file, *options):
    command = [sys.executable, "-m", "unicfg", "train", str(file), *options]
    return subprocess.run(command, capture_output=True, text=True)


# recipes


def test_shipped_recipes_are_valid():
    for name in ("emoji", "emoji-tokenizer", "shapes", "shapes-weak"):
        recipe = load_recipe(f"examples/recipes/{name}.yaml")
        assert recipe.model.family == "ar" and recipe.model.condition_dropout == 0.1


def test_a_recipe_is_read_with_its_types(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_recipe("x", betas=[0.9, 0.99])))
    assert recipe.tokenizer.levels == (5, 5, 5)
    assert recipe.model.training.betas == (0.9, 0.99)
    assert recipe.model.training.clip == 1.0  # a default


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modle": {}}, "unknown key 'modle', expected one of .*'model'"),
        ({"model": {"widht": 3}}, "model: unknown key 'widht', expected one of .*'width'"),
        ({"model": {"training": {"lr": 1}}}, "model: training: unknown key 'lr'.*'learning_rate'"),
        ({"model": {"width": "wide"}}, "model.width"),
        ({"prompts": "a red circle"}, "prompts is 'a red circle', expected a list"),
        ({"tokenizer": {"levels": 5}}, "levels is 5, expected a list"),
        ({"model": {"dropout": "abc"}}, "dropout is 'abc', expected a number"),
        ({"model": {"training": {"learning_rate": "1e-3"}}}, r"write 1\.0e-3"),
        ({"model": {"training": {"clip": -1}}}, "clip is -1"),
        ({"model": {"condition_dropout": 2}}, "condition_dropout is 2"),
        ({"model": 3}, "model is 3, expected a section"),
        (
            {"model": {"family": "gan"}},
            "family is 'gan', expected one of ar, masked, diffusion, flow",
        ),
        ({"families": {"gan": {}}}, "family is 'gan'"),
        ({"families": {"ar": 3}}, "families: 3, expected a section"),
        ({"model": {"training": {"steps": 0}}}, "steps is 0, expected at least 1"),
        ({"model": {"training": {"ema": 1.0}}}, r"ema is 1\.0"),
        (
            {"model": {"training": {"optimizer": "sgd"}}},
            r"optimizer is 'sgd', expected one of \['adamw', 'muon'\]",
        ),
        ({"model": {"training": {"betas": [0.9]}}}, r"betas is \[0\.9\], expected 2 values"),
        (
            {"model": {"training": {"precision": "half"}}},
            r"precision is 'half', expected one of \['float32', 'bfloat16', None\]",
        ),
    ],
)
def test_bad_recipes_are_refused_with_the_key(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write_recipe(tmp_path, {"out": "x"} | change))


def test_files_that_are_no_recipe(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="holds list, expected a mapping"):
        load_recipe(tmp_path / "list.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is no YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "empty.yaml").write_text("data: {}")
    with pytest.raises(ValueError, match="out"):
        load_recipe(tmp_path / "empty.yaml")


def test_a_recipe_without_a_folder_is_refused():
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        open_source(Recipe(out="x").data)


# the loop


def test_batches_are_a_function_of_seed_and_step():
    whole = list(EpochBatches(10, 3, steps=9, seed=1))
    assert list(EpochBatches(10, 3, steps=9, seed=1, start=4)) == whole[4:]
    assert list(EpochBatches(10, 3, steps=9, seed=2)) != whole
    first_epoch = [i for batch in whole[:3] for i in batch]
    assert len(set(first_epoch)) == 9  # each sample at most once an epoch
    assert whole[:3] != whole[3:6]
    with pytest.raises(ValueError, match="count is 0"):
        EpochBatches(0, 3, 9, 1)


def test_learning_rate_by_hand():
    settings = Optimization(steps=110, warmup=10, learning_rate=1.0, final_learning_rate=0.2)
    assert learning_rate(0, settings) == pytest.approx(0.1)
    assert learning_rate(9, settings) == pytest.approx(1.0)
    assert learning_rate(60, settings) == pytest.approx(0.6)
    assert learning_rate(110, settings) == pytest.approx(0.2)


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 1))

    def forward(self, x):
        return x @ self.weight


def line_loss(module, batch, step, part):
    x, y = batch
    return (module(x) - y).square().mean()


def line_data(n=64):
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x, x @ torch.tensor([[1.0], [-2.0], [0.5]]))


def test_fit_finds_a_line_and_returns_the_average(tmp_path):
    settings = Optimization(
        steps=400,
        batch_size=16,
        learning_rate=0.05,
        weight_decay=0.0,
        ema=0.9,
        checkpoint_every=100,
    )
    trained = fit(Line(), line_data(), line_loss, settings, tmp_path, tracker=False)
    assert not trained.training
    torch.testing.assert_close(
        trained.weight.detach(), torch.tensor([[1.0], [-2.0], [0.5]]), atol=1e-2, rtol=0
    )
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 400 and lines[-1]["loss"] < 1e-3
    assert {"loss", "learning_rate", "gradient_norm", "samples_per_second"} <= lines[-1].keys()
    assert len(Checkpoints(tmp_path / "checkpoints").files()) == 2  # the others are removed


@pytest.mark.parametrize(("precision", "used"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_products_have_the_precision_of_the_recipe_and_weights_stay_float32(
    tmp_path, precision, used
):
    seen = set()

    def loss(module, batch, step, part):
        seen.add(module(batch[0]).dtype)
        return line_loss(module, batch, step, part)

    settings = Optimization(steps=2, precision=precision)
    trained = fit(Line(), line_data(), loss, settings, tmp_path, tracker=False)
    assert seen == {getattr(torch, used)} and trained.weight.dtype == torch.float32


def test_a_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    def broken(module, batch, step, part):
        return line_loss(module, batch, step, part) * (float("nan") if step == 3 else 1)

    settings = Optimization(steps=9, batch_size=4)
    samples = EpochBatches(64, 4, 9, settings.seed).at(3)
    named = f"loss is nan at step 3, batch of samples {', '.join(map(str, samples))}: lower"
    with pytest.raises(FloatingPointError, match=named):
        fit(Line(), line_data(), broken, settings, tmp_path, tracker=False)


@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_steps_that_are_not_finite_may_be_skipped(tmp_path, capsys, of):
    """A skipped step changes nothing; too many in a row stop the training."""
    bad, seen = {2, 3, 6}, []

    def broken(module, batch, step, part):
        seen.append(module.weight.detach().clone())
        loss = line_loss(module, batch, step, part)
        if step not in bad:
            return loss
        # the root of 0 has a value and no slope
        return loss * float("nan") if of == "loss" else (0 * module.weight).sum().sqrt() + loss

    settings = Optimization(steps=9, batch_size=4, skip_not_finite=2)
    trained = fit(Line(), line_data(), broken, settings, tmp_path / "a", tracker=False)
    assert torch.isfinite(trained.weight).all()
    for step in range(8):
        assert torch.equal(seen[step], seen[step + 1]) == (step in bad)
    told = capsys.readouterr()
    assert "step 3, batch of samples" in told.out + told.err
    assert "skipped (2 of 2 in a row)" in told.out + told.err
    bad |= {4}
    with pytest.raises(FloatingPointError, match=rf"{of} is .* at step 4"):
        fit(Line(), line_data(), broken, settings, tmp_path / "b", tracker=False)


def test_a_product_that_overflows_in_half_precision_stops_a_training(tmp_path):
    """Beyond 65504 a float16 product is infinite: the training says so and does not go on with it."""

    def half(module, batch, step, part):
        x, y = batch
        out = (x.half() * 1e4) @ (module.weight.half() + 1e2)
        return (out.float() - y).square().mean()

    with pytest.raises(FloatingPointError, match="loss is inf at step 0"):
        fit(Line(), line_data(), half, Optimization(steps=2), tmp_path, tracker=False)


def test_stages_end_where_asked_and_are_taken_up(tmp_path, capsys):
    out = tmp_path / "run"
    file = str(write_recipe(tmp_path, tiny_recipe(out, steps=1)))
    for until, made, missing in (
        ("images", "images/train/shards.json", "tokenizer"),
        ("tokenizer", "tokenizer/config.json", "codes"),
        ("codes", "codes/train-2x1/shards.json", "ar"),
    ):
        with pytest.raises(SystemExit):
            main(["train", file, "--resume", "--until", until])
        assert f"stopped after the stage {until}; {out} has it" in capsys.readouterr().out
        assert (out / made).exists() and not (out / missing).exists()
    assert train(load_recipe(file), resume=True) is not None
    with pytest.raises(ValueError, match="until is 'end', expected one of images, tokenizer"):
        train(load_recipe(file), until="end")


def test_resuming_with_other_settings_is_refused(tmp_path):
    settings = Optimization(steps=4, checkpoint_every=2)
    fit(Line(), line_data(), line_loss, settings, tmp_path, tracker=False)
    changed = dataclasses.replace(settings, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate.*0\.001.*now \[0\.5\]"):
        fit(Line(), line_data(), line_loss, changed, tmp_path, resume=True, tracker=False)


@pytest.mark.parametrize("rubbish", ['{"step": 3, "lo', "null", '"x"', "[1]", '{"loss": 1}'])
def test_half_a_line_in_the_log_is_dropped(tmp_path, rubbish):
    """As a kill or a full disk leaves it."""
    MetricsLog(tmp_path / "m.jsonl", 0).write(1, {"loss": 1.0})
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write(rubbish)
    MetricsLog(tmp_path / "m.jsonl", 2).write(2, {"loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}]


def test_a_skipped_step_leaves_buffers_alone(tmp_path):
    """A learned codebook moves in the pass itself, before anyone knows that the loss is not finite."""

    class Moving(Line):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, x):
            self.mean += x.mean()
            return super().forward(x) + self.mean

    def broken(module, batch, step, part):
        x, y = batch
        return (module(x * (float("nan") if step == 2 else 1)) - y).square().mean()

    settings = Optimization(steps=5, batch_size=4, skip_not_finite=1)
    trained = fit(Moving(), line_data(), broken, settings, tmp_path, tracker=False)
    assert torch.isfinite(trained.mean) and torch.isfinite(trained.weight).all()


def test_images_are_enough_where_the_data_is_gone(tmp_path, capsys):
    values = tiny_recipe(tmp_path / "run", steps=1)
    scenes = make_shapes(12, size=16)
    (tmp_path / "data").mkdir()
    for i, (image, caption) in enumerate(zip(scenes.images, scenes.captions, strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"data/{i}.png")
        (tmp_path / f"data/{i}.txt").write_text(caption)
    values["data"] = {"path": str(tmp_path / "data"), "image_size": 16, "validation": 0.3}
    file = write_recipe(tmp_path, values)
    train(load_recipe(file), until="images")
    shutil.rmtree(tmp_path / "data")
    train(load_recipe(file), resume=True)
    assert "the data is not at" in capsys.readouterr().out
    values["out"] = str(tmp_path / "other")
    with pytest.raises(FileNotFoundError, match="no folder at"):
        train(load_recipe(write_recipe(tmp_path, values)), resume=True)


def test_what_killed_processes_left_is_removed(tmp_path):
    recipe = load_recipe(write_recipe(tmp_path, tiny_recipe(tmp_path / "run", steps=1)))
    train(recipe)
    for folder in ("tokenizer", "images", "logs/ar/checkpoints", "."):
        (tmp_path / "run" / folder / ".something.99.tmp").write_bytes(b"half")
    train(recipe, resume=True)
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_files_that_are_not_ours_are_left_alone(tmp_path):
    mine = [tmp_path / "run" / name for name in (".notes.tmp", ".folder.7.tmp")]
    mine[1].mkdir(parents=True)
    mine[0].write_text("mine")
    train(load_recipe(write_recipe(tmp_path, tiny_recipe(tmp_path / "run", steps=1))))
    assert mine[0].read_text() == "mine" and mine[1].is_dir()


def test_settings_of_a_model_are_open_until_it_has_a_checkpoint(tmp_path, monkeypatch):
    values = tiny_recipe(tmp_path / "run", steps=2)

    def ends(*args, **options):
        raise FloatingPointError("lower the learning rate")

    with monkeypatch.context() as patch, pytest.raises(FloatingPointError):
        patch.setattr("unicfg.training.trainer._train_model", ends)
        train(load_recipe(write_recipe(tmp_path, values)))
    values["model"]["training"]["learning_rate"] = 1e-4
    recipe = load_recipe(write_recipe(tmp_path, values))
    train(recipe, resume=True)
    held = json.loads((tmp_path / "run/recipe.json").read_text())
    assert held["models"]["ar"]["training"]["learning_rate"] == 1e-4
    values["model"]["training"]["learning_rate"] = 1e-3
    with pytest.raises(ValueError, match=r"learning_rate was 0\.0001, now 0\.001"):
        train(load_recipe(write_recipe(tmp_path, values)), resume=True)


def test_the_log_of_a_resumed_run_has_each_step_once(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    for step in range(1, 6):
        log.write(step, {"loss": step})
    MetricsLog(tmp_path / "m.jsonl", 3).write(4, {"loss": 40})
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss"] == 40


# checkpoints


def test_a_broken_checkpoint_is_passed_over_for_the_one_before(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=3)
    for step in (1, 2, 3):
        checkpoints.save(step, {"x": torch.full((4,), float(step))}, {"a": step})
    newest = checkpoints.files()[-1]
    newest.write_bytes(newest.read_bytes()[:-5])
    step, tensors, settings = checkpoints.load()
    assert step == 2 and tensors["x"].tolist() == [2.0] * 4 and settings == {"a": 2}
    assert "step-00000003" in capsys.readouterr().out
    assert Checkpoints(tmp_path / "none").load() is None


def test_a_broken_checkpoint_does_not_cost_the_ones_that_follow(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(200, {"x": torch.zeros(4)}, {})
    checkpoints.files()[0].write_bytes(b"broken")
    assert checkpoints.load() is None and "starting at step 0" in capsys.readouterr().out
    for step in (50, 100):
        checkpoints.save(step, {"x": torch.zeros(4)}, {})
        assert checkpoints.load()[0] == step


def test_a_full_disk_leaves_the_old_file_whole_and_no_rubbish(tmp_path):
    """A limit on file size stands for the full disk: both end in a failed write."""
    file = tmp_path / "weights.safetensors"
    write_atomically({"x": torch.ones(4)}, file, {})
    code = (
        "import resource, signal, sys, torch; from pathlib import Path;"
        "from tokenizers_vq.files import write_atomically;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "write_atomically({'x': torch.ones(1_000_000)}, Path(sys.argv[1]), {})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "OSError: could not write" in done.stderr and "4.0 MB" in done.stderr
    assert load_file(file)["x"].tolist() == [1.0] * 4
    assert os.listdir(tmp_path) == ["weights.safetensors"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000  # the limit was the child's own


def test_writing_ends_in_one_rename(tmp_path, monkeypatch):
    """Nothing touches the old file before the new one is complete beside it."""
    file = tmp_path / "weights.safetensors"
    write_atomically({"x": torch.ones(4)}, file, {})

    def refuse(source, target):
        assert load_file(source)["x"].tolist() == [2.0] * 4 and target == file
        raise OSError("renaming failed")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match=r"could not write .*renaming failed"):
        write_atomically({"x": torch.full((4,), 2.0)}, file, {})
    assert load_file(file)["x"].tolist() == [1.0] * 4
    assert os.listdir(tmp_path) == ["weights.safetensors"]


# encodings


def test_crops_and_shift_go_together():
    with pytest.raises(ValueError, match="crops is 4 and shift 0"):
        ModelRecipe(crops=4)
    with pytest.raises(ValueError, match="crops is 1 and shift 2"):
        ModelRecipe(shift=2)
    with pytest.raises(ValueError, match="crops is 0"):
        ModelRecipe(crops=0)


# whole trainings


def kill_when(command, file):
    """Start a command and SIGKILL it as soon as ``file`` is there."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        began = time.monotonic()
        while not file.exists():
            assert process.poll() is None and time.monotonic() - began < 120
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)


def with_muon(values):
    values["model"]["training"] |= {"optimizer": "muon"}
    return values


def test_killed_and_resumed_equals_uninterrupted(tmp_path):
    """Weights, average, both optimizers, data order, dropout draws, log: bit-equal after two kills."""
    whole = write_recipe(tmp_path, with_muon(tiny_recipe(tmp_path / "whole", steps=12)))
    assert run(whole).returncode == 0
    out = tmp_path / "killed"
    recipe = write_recipe(tmp_path, with_muon(tiny_recipe(out, steps=12)))
    command = [sys.executable, "-m", "unicfg", "train", str(recipe), "--resume"]
    for stage in ("tokenizer", "ar"):
        kill_when(command, out / f"logs/{stage}/checkpoints/step-00000004.safetensors")
        assert not (out / stage / "config.json").exists()  # the stage was not finished
    again = run(recipe, "--resume")
    assert again.returncode == 0, again.stderr
    assert "ar goes on from step 4" in again.stdout + again.stderr  # and not from the start
    files = ["tokenizer/model", "ar/model"]
    files += [f"logs/{stage}/checkpoints/step-00000012" for stage in ("tokenizer", "ar")]
    for name in files:
        a, b = (load_file(f / f"{name}.safetensors") for f in (tmp_path / "whole", out))
        assert a.keys() == b.keys()
        assert [k for k in a if not torch.equal(a[k], b[k])] == []
    losses = [
        [json.loads(x).get("loss") for x in (f / "logs/ar/metrics.jsonl").read_text().splitlines()]
        for f in (tmp_path / "whole", out)
    ]
    assert losses[0] == losses[1]


def test_learned_codebook_and_critic_resume_too(tmp_path):
    """The other options of the tokenizer through the whole trainer: bit-equal after losing the end."""
    options = {"quantizer": "vq", "codebook_size": 32, "adversarial": 0.1}
    states = []
    for name in ("whole", "cut"):
        values = tiny_recipe(tmp_path / name, steps=6)
        values["tokenizer"] |= options
        recipe = load_recipe(write_recipe(tmp_path, values))
        train(recipe)
        if name == "cut":
            folder = tmp_path / name / "logs/tokenizer/checkpoints"
            (folder / "step-00000006.safetensors").unlink()
            for part in ("tokenizer", "ar"):
                (tmp_path / name / part / "model.safetensors").unlink()
            shutil.rmtree(tmp_path / name / "logs/ar")
            train(recipe, resume=True)
        checkpoint = tmp_path / name / "logs/tokenizer/checkpoints/step-00000006.safetensors"
        states.append(load_file(checkpoint) | load_file(tmp_path / name / "ar/model.safetensors"))
    whole, cut = states
    critics = [k for k in whole if k.startswith("model/adversarial")]
    assert critics and whole.keys() == cut.keys()
    assert [k for k in whole if not torch.equal(whole[k], cut[k])] == []
    start = dict(tiny_critic(tmp_path).named_parameters())
    moved = [k for k in critics if not torch.equal(whole[k], start[k.removeprefix("model/")])]
    assert moved == critics  # the critic was trained


def tiny_critic(folder):
    """The tokenizer with its losses as the trainer makes it, before the first step."""
    values = tiny_recipe(folder / "start")
    values["tokenizer"] |= {"quantizer": "vq", "codebook_size": 32, "adversarial": 0.1}
    recipe = load_recipe(write_recipe(folder, values))
    set_seed(recipe.tokenizer.training.seed)
    config = _tokenizer_config(recipe.tokenizer, recipe.data.image_size)
    return _TokenizerLoss(VQTokenizer(config), recipe.tokenizer)


def test_kernels_have_their_channels_last_and_so_has_what_is_restored_for_them(tmp_path):
    def made():
        loss = tiny_critic(tmp_path)
        average = torch.optim.swa_utils.AveragedModel(loss)
        return loss, average, make_optimizers(loss, Optimization())

    loss, average, optimizers = made()
    loss(torch.rand(2, 3, 16, 16) * 2 - 1, 0).backward()
    optimizers[0].step()
    again, its_average, its_optimizers = made()
    kernel = loss.tokenizer.encoder.stem[1].weight
    assert not kernel.is_contiguous() and kernel.is_contiguous(memory_format=torch.channels_last)
    # a file holds them without their layout
    tensors = {k: v.contiguous() for k, v in training_state(loss, average, optimizers).items()}
    restore_training_state(tensors, again, its_average, its_optimizers)
    for parameter, own in zip(loss.parameters(), again.parameters(), strict=True):
        assert torch.equal(parameter, own) and parameter.stride() == own.stride()
        state = its_optimizers[0].state[own]
        for name in ("exp_avg", "exp_avg_sq") if state else ():
            assert torch.equal(state[name], optimizers[0].state[parameter][name])
            assert state[name].stride() == own.stride()


def test_a_run_leaves_logs_pictures_and_a_pipeline(tmp_path):
    out = tmp_path / "run"
    file = write_recipe(tmp_path, tiny_recipe(out, steps=2, sample_every=1))
    done = run(file)
    assert done.returncode == 0, done.stderr
    assert f"the pipeline is in {out}" in done.stdout
    assert (out / "pictures/ar-000002.png").exists()
    assert (out / "pictures/tokenizer-000002.png").exists()
    lines = [json.loads(x) for x in (out / "logs/tokenizer/metrics.jsonl").read_text().splitlines()]
    report = next(line for line in lines if "psnr" in line)
    assert {"codebook_usage", "codebook_perplexity"} <= report.keys()
    assert TextToImage.from_pretrained(out)(["a red circle"], seeds=[0])[0].size == (16, 16)
    train_set, val_set = (
        Shards(out / "codes" / name, ("ids",)) for name in ("train-2x1", "validation-1x0")
    )
    assert len(train_set) // 2 + len(val_set) == 40 and len(train_set) % 2 == 0
    refused = run(file)
    assert refused.returncode == 2 and "already holds a run of the family ar" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.parametrize("family", ["masked", "diffusion", "flow", "hybrid"])
def test_every_family_joins_a_run_and_resumes_exactly(tmp_path, family, capsys):
    """Added to the folder of an ar run, it shares the tokenizer; losing its end changes nothing."""
    out = tmp_path / "run"
    file = write_recipe(tmp_path, tiny_recipe(out, steps=4))
    train(load_recipe(file))
    tokenizer = (out / "tokenizer/model.safetensors").read_bytes()
    train(load_recipe(file, family))
    assert (out / "tokenizer/model.safetensors").read_bytes() == tokenizer
    assert (out / f"pictures/{family}-000004.png").exists()
    assert held_families(out) == ["ar", family]
    whole = load_file(out / family / "model.safetensors")
    (out / f"logs/{family}/checkpoints/step-00000004.safetensors").unlink()
    shutil.rmtree(out / family)
    capsys.readouterr()
    train(load_recipe(file, family), resume=True)
    told = capsys.readouterr()
    assert f"{family} goes on from step 2" in told.out + told.err
    again = load_file(out / family / "model.safetensors")
    assert [key for key in whole if not torch.equal(whole[key], again[key])] == []
    pipe = TextToImage.from_pretrained(out, family)
    assert pipe(["a red circle"], seeds=[0], guidance=Guidance(2.0))[0].size == (16, 16)


def test_a_family_does_not_join_a_run_with_another_tokenizer(tmp_path):
    values = tiny_recipe(tmp_path / "run", steps=1)
    train(load_recipe(write_recipe(tmp_path, values)))
    values["tokenizer"]["width"] = 32
    with pytest.raises(ValueError, match=r"cannot add to .*tokenizer/width was 16, now 32"):
        train(load_recipe(write_recipe(tmp_path, values), "flow"))


def test_a_run_that_ends_before_the_model_leaves_its_settings_open(tmp_path):
    values = tiny_recipe(tmp_path / "run", steps=1)
    train(load_recipe(write_recipe(tmp_path, values)), until="tokenizer")
    values["model"]["width"] = 64
    recipe = load_recipe(write_recipe(tmp_path, values))
    with pytest.raises(ValueError, match="already holds a run that has no model yet: resume"):
        train(recipe)
    pipe = train(recipe, resume=True)
    assert pipe.network.config.width == 64
    values["model"]["width"] = 32
    with pytest.raises(ValueError, match="model/width was 64, now 32"):
        train(load_recipe(write_recipe(tmp_path, values)), resume=True, until="tokenizer")


@pytest.mark.parametrize("crops", [1, 2])
def test_a_seed_may_change_after_the_codes(tmp_path, crops):
    """It is a setting of the model, which those are open to; codes that it would shift elsewhere are made beside."""
    values = tiny_recipe(tmp_path / "run", steps=1)
    values["model"] |= {"crops": crops, "shift": crops - 1}
    train(load_recipe(write_recipe(tmp_path, values)), until="codes")
    values["model"]["training"]["seed"] = 7
    train(load_recipe(write_recipe(tmp_path, values)), resume=True)
    made = {folder.name for folder in (tmp_path / "run/codes").iterdir()}
    both = {"train-2x1", "train-2x1-seed7"} if crops == 2 else {"train-1x0"}
    assert made == both | {"validation-1x0"}
    ids = [Shards(tmp_path / "run/codes" / name, ("ids",)).first(100)[0] for name in sorted(both)]
    assert crops == 1 or not torch.equal(*ids)


def test_a_tokenizer_may_move_and_not_change(tmp_path):
    """What the run has a copy of is compared by its weights, not by the path that it was copied from."""
    values = tiny_recipe(tmp_path / "first", steps=1)
    train(load_recipe(write_recipe(tmp_path, values)), until="tokenizer")
    first, moved, run = tmp_path / "first/tokenizer", tmp_path / "moved", tmp_path / "run"

    def resume(folder, until):
        changed = values | {"out": str(run), "tokenizer": {"pretrained": str(folder)}}
        train(load_recipe(write_recipe(tmp_path, changed)), resume=True, until=until)

    resume(first, "images")
    first.rename(moved)
    resume(moved, "codes")  # from here on there is a copy
    elsewhere = tmp_path / "elsewhere"
    moved.rename(elsewhere)
    resume(elsewhere, "model")
    assert str(elsewhere) in (run / "recipe.json").read_text()
    settings, other = (run / "recipe.json").read_text(), VQTokenizer.from_pretrained(elsewhere)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError,
        match=r"was '.*elsewhere', whose copy is in .*run/tokenizer, and the one at '.*other' is another",
    ):
        resume(tmp_path / "other", "model")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer at '.*moved'"):
        resume(moved, "model")
    assert (run / "recipe.json").read_text() == settings


@pytest.mark.parametrize("where", ["pipeline", "tokenizer"])
def test_a_tokenizer_that_is_there_is_taken_and_not_trained(tmp_path, where):
    values = tiny_recipe(tmp_path / "first", steps=1)
    first = train(load_recipe(write_recipe(tmp_path, values)))
    folder = tmp_path / "first" / ("" if where == "pipeline" else "tokenizer")
    values |= {"out": str(tmp_path / "second"), "tokenizer": {"pretrained": str(folder)}}
    second = train(load_recipe(write_recipe(tmp_path, values)))
    for key, tensor in first.tokenizer.state_dict().items():
        assert torch.equal(tensor, second.tokenizer.state_dict()[key])
    assert not (tmp_path / "second/logs/tokenizer").exists()
    # it belongs to the run, which goes on without the folder that it came from
    shutil.rmtree(tmp_path / "first")
    train(load_recipe(write_recipe(tmp_path, values), "flow"))
    values["data"]["image_size"] = 32
    with pytest.raises(
        ValueError, match=r"image_size is 32, expected 16, which the tokenizer in .*second"
    ):
        train(load_recipe(write_recipe(tmp_path, values)))


@pytest.mark.parametrize(
    ("tokenizer", "error", "match"),
    [
        (
            {"pretrained": "shapes"},
            ValueError,
            "image_size is 16, expected 32, which the tokenizer in",
        ),
        ({"pretrained": "shape"}, FileNotFoundError, "no tokenizer at 'shape': expected one of"),
        ({"pretrained": "a/b/c"}, FileNotFoundError, "no tokenizer at 'a/b/c'"),
        (
            {"pretrained": "shapes", "width": 32, "training": {"steps": 2}},
            ValueError,
            "pretrained is 'shapes' beside width, training, expected it alone",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_taken_is_said_before_any_work(
    tmp_path, tokenizer, error, match
):
    values = tiny_recipe(tmp_path / "run", steps=1) | {"tokenizer": tokenizer}
    with pytest.raises(error, match=match):
        train(load_recipe(write_recipe(tmp_path, values)))
    assert not (tmp_path / "run").exists()


def test_what_a_family_has_of_its_own_replaces_the_shared_settings(tmp_path):
    values = tiny_recipe(tmp_path / "run")
    values["families"] = {"flow": {"patch": 2, "training": {"batch_size": 3}}, "masked": {}}
    file = write_recipe(tmp_path, values)
    flow, ar = load_recipe(file, "flow").model, load_recipe(file).model
    assert (flow.family, flow.patch, flow.training.batch_size) == ("flow", 2, 3)
    assert flow.width == ar.width == 32 and flow.training.steps == ar.training.steps
    assert (ar.family, ar.patch, ar.training.batch_size) == ("ar", 1, 8)
    values["model"]["family"] = "flow"
    assert load_recipe(write_recipe(tmp_path, values)).model == flow


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("ar", {"patch": 2}, "patch is 2, expected it to be left alone for the family ar"),
        ("flow", {"noise": {"space": "v"}}, "expected 'straight' and 'flow' for the family flow"),
        ("diffusion", {"noise": {"space": "x"}}, "space is 'x', expected one of eps, x0, v"),
        ("diffusion", {"noise": {"path": "sine"}}, "path is 'sine', expected one of 'straight'"),
        ("diffusion", {"noise": {"path": "linear to zero", "space": "eps"}}, "ends in pure noise"),
        ("diffusion", {"patch": 3}, "patch is 3, expected a divisor of the grid 4"),
        ("hybrid", {"head": {"depth": 0}}, "head: depth is 0, expected at least 1"),
        ("hybrid", {"head": {"draws": 0}}, "head: draws is 0"),
        ("hybrid", {"head": {"context_noise": -0.1}}, r"head: context_noise is -0\.1"),
        ("flow", {"noise": {"min_snr": -1.0}}, r"noise: min_snr is -1\.0"),
        ("flow", {"noise": {"shift": 0.0}}, r"noise: shift is 0\.0"),
        ("ar", {"noise": {"min_snr": 5.0}}, "expected it to be left alone for the family ar"),
        ("flow", {"head": {"draws": 2}}, "expected it to be left alone for the family flow"),
    ],
)
def test_settings_that_no_family_can_have_are_refused(tmp_path, family, change, message):
    values = tiny_recipe(tmp_path / "x")
    values["model"] |= change
    with pytest.raises(ValueError, match=message):
        train(load_recipe(write_recipe(tmp_path, values), family))
    assert not (tmp_path / "x").exists()


def test_an_image_size_that_is_no_multiple_of_the_factor_is_refused(tmp_path):
    values = tiny_recipe(tmp_path / "x")
    values["data"] |= {"image_size": 24}
    values["tokenizer"] |= {"factor": 16}
    done = run(write_recipe(tmp_path, values))
    assert done.returncode == 2
    assert "image_size is 24, expected a multiple of the factor 16" in done.stderr


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"condition_dropout": 0.9}, "model/condition_dropout was 0.3, now 0.9"),
        ("data", {"wrong": 0.9}, "data/wrong was 0.15, now 0.9"),
        ("tokenizer", {"width": 32}, "tokenizer/width was 16, now 32"),
    ],
)
def test_a_run_is_not_resumed_with_another_recipe(tmp_path, section, change, message):
    out = tmp_path / "run"
    values = tiny_recipe(out, steps=1)
    train(load_recipe(write_recipe(tmp_path, values)))
    before = (out / "recipe.json").read_text()
    values[section] |= change
    with pytest.raises(ValueError, match=message):
        train(load_recipe(write_recipe(tmp_path, values)), resume=True)
    assert (out / "recipe.json").read_text() == before


def test_a_run_of_an_older_release_resumes_where_new_settings_are_as_usual(tmp_path):
    """A setting that its files do not know was as it is by default."""
    out = tmp_path / "run"
    values = tiny_recipe(out, steps=4)
    train(load_recipe(write_recipe(tmp_path, values)))
    file = out / "recipe.json"
    held = json.loads(file.read_text())
    del held["data"]["revision"], held["models"]["ar"]["training"]["accumulate"]
    file.write_text(json.dumps(held))
    checkpoints = Checkpoints(out / "logs/ar/checkpoints")
    checkpoints.files()[-1].unlink()
    step, tensors, settings = checkpoints.load()
    del settings["accumulate"]
    checkpoints.save(step, tensors, settings)
    train(load_recipe(write_recipe(tmp_path, values)), resume=True)
    assert checkpoints.load()[0] == 4
    file.write_text(json.dumps(held))
    values["model"]["training"]["accumulate"] = 2
    with pytest.raises(ValueError, match="model/training/accumulate was 1, now 2"):
        train(load_recipe(write_recipe(tmp_path, values)), resume=True)


def test_other_data_is_not_resumed_and_a_finished_run_may_be(tmp_path, monkeypatch):
    recipe = load_recipe(write_recipe(tmp_path, tiny_recipe(tmp_path / "run", steps=1)))
    train(recipe)
    train(recipe, resume=True)
    source = open_source(recipe.data)
    source.made_from = "another"
    monkeypatch.setattr("unicfg.training.trainer.open_source", lambda _: source)
    with pytest.raises(ValueError, match="data_made_from"):
        train(recipe, resume=True)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("model", {"heads": 5}, "width is 32, expected a multiple of heads"),
        ("text", {"vocabulary": 100}, "vocabulary is 100, expected at least 259"),
        ("tokenizer", {"levels": [5, 1]}, r"levels is \(5, 1\)"),
        (
            "model",
            {"training": {"batch_size": 8, "accumulate": 3}},
            "batch_size is 8, expected a mu",
        ),
        (
            "tokenizer",
            {"training": {"batch_size": 8, "accumulate": 3}},
            "batch_size is 8, expected",
        ),
        ("tokenizer", {"training": {"optimizer": "muon"}}, "optimizer is 'muon', expected 'adamw'"),
    ],
)
def test_settings_are_refused_before_anything_is_written(tmp_path, section, change, message):
    values = tiny_recipe(tmp_path / "run")
    values[section] |= change
    with pytest.raises(ValueError, match=message):
        train(load_recipe(write_recipe(tmp_path, values)))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["bpe", "classes"])
def test_overfitting_four_captions_draws_them_back(tmp_path, monkeypatch, kind):
    """End to end: four flat colours by name; guidance makes the named colour more certain."""
    colours = {
        "red": (255, 0, 0),
        "green": (0, 255, 0),
        "blue": (0, 0, 255),
        "white": (255, 255, 255),
    }
    names = list(colours) * 10

    class Flat:
        made_from, count, size, skipped = "colours", len(names), 8, []

        def entries(self):
            return (Entry(str(i), name) for i, name in enumerate(names))

        def read(self, entry):
            image = torch.tensor(colours[entry.content], dtype=torch.uint8)
            return image[:, None, None].expand(3, 8, 8), entry.content

    monkeypatch.setattr("unicfg.training.trainer.open_source", lambda recipe: Flat())
    settings = {"batch_size": 16, "learning_rate": 5e-3, "ema": 0.9, "warmup": 5}
    settings |= {"sample_every": 1000, "checkpoint_every": 1000}
    values = tiny_recipe(tmp_path / "run", steps=150)
    values["data"]["image_size"] = 8
    values["text"]["kind"] = kind
    values["model"] |= {"dropout": 0.0, "condition_dropout": 0.1}
    for part in ("tokenizer", "model"):
        values[part]["training"] = settings | {"steps": 200}
    train(load_recipe(write_recipe(tmp_path, values)))
    pipe = TextToImage.from_pretrained(tmp_path / "run")
    assert pipe.text.length == (1 if kind == "classes" else 12)
    for s, temperature in ((1.0, 0.0), (3.0, 1.0)):
        out = pipe.sample(
            list(colours), seeds=[0, 1, 2, 3], guidance=Guidance(s), temperature=temperature
        )
        target = torch.tensor(list(colours.values())).float() / 127.5 - 1
        distance = (out.mean((2, 3))[:, None] - target).norm(dim=-1)
        assert distance.argmin(1).tolist() == [0, 1, 2, 3]
