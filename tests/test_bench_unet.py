"""Ours and denoising-diffusion-pytorch's make one image from one network and one noise, and where they do not, why."""

import math
import sys
import warnings
from pathlib import Path

import pytest
import torch

from unicfg import Guidance
from unicfg.guidance.mitigations import static_threshold

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import timing
import unet as bench

SPACES = {"pred_v": "v", "pred_x0": "x0", "pred_noise": "eps"}
CLASSES = torch.tensor([3, 7])


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in (("DIM", 8), ("MULTIPLES", (1, 2)), ("SIDE", 16), ("STEPS", 3)):
        monkeypatch.setattr(bench, name, value)
    # the peer draws from the global generator
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def module():
    return bench.peer()  # its error says how to install it; make test does


@pytest.fixture
def network(module):
    made = bench.make_unet(module)
    for parameter in made.classes_mlp.parameters():
        parameter.data.mul_(4)  # so that classes make a difference
    return made


def one_at_a_time(sampling):
    """Theirs (2, 3, H, W) in [-1, 1], from the noise that ours has for the seeds 0 and 1."""
    images = []
    for seed, label in enumerate(CLASSES):
        torch.manual_seed(seed)
        images.append(sampling(label[None]))
    return torch.cat(images) * 2 - 1


def distance(a, b):
    return float((a - b).abs().max() / b.abs().max())


def ours(network, diffusion, guidance, objective="pred_v"):
    path = bench.steps_of(diffusion)
    return bench.sample(network, path, CLASSES, guidance, SPACES[objective])


@pytest.mark.parametrize("steps", [3, 20])
@pytest.mark.parametrize("objective", ["pred_v", "pred_x0"])
def test_their_sampling_is_ours_with_projection_rescaling_and_clipping(
    module, network, monkeypatch, objective, steps
):
    monkeypatch.setattr(bench, "STEPS", steps)
    diffusion = bench.make_diffusion(module, network, objective)
    theirs = one_at_a_time(lambda label: diffusion.sample(label, cond_scale=3.0))
    guidance = bench.their_guidance(3.0)
    assert distance(ours(network, diffusion, guidance, objective), theirs) < 2e-5


@pytest.mark.parametrize("left_out", [0, 1, 2])
def test_each_of_the_three_is_needed(module, network, left_out):
    diffusion = bench.make_diffusion(module, network)
    theirs = one_at_a_time(lambda label: diffusion.sample(label, cond_scale=3.0))
    reins = list(bench.their_guidance(3.0).mitigations)
    del reins[left_out]
    assert distance(ours(network, diffusion, Guidance(3.0, tuple(reins))), theirs) > 1e-2


@pytest.mark.parametrize("steps", [3, 7])
@pytest.mark.parametrize("objective", SPACES)
def test_their_plain_sampling_is_our_plain_guidance(module, network, monkeypatch, objective, steps):
    monkeypatch.setattr(bench, "STEPS", steps)
    diffusion = bench.make_diffusion(module, bench.without_projection(network), objective)
    theirs = one_at_a_time(lambda label: bench.their_plain(diffusion, label, 3.0))
    assert distance(ours(network, diffusion, Guidance(3.0), objective), theirs) < 2e-5
    assert distance(ours(network, diffusion, Guidance(2.9), objective), theirs) > 1e-4


def test_their_unguided_sampling_is_ours(module, network):
    diffusion = bench.make_diffusion(module, bench.without_guidance(network))
    theirs = one_at_a_time(lambda label: bench.their_plain(diffusion, label, 1.0))
    assert distance(ours(network, diffusion, Guidance(1.0)), theirs) < 2e-5


@pytest.mark.parametrize("batch", [1, 3])
def test_theirs_does_not_sample_at_scale_1_by_itself(module, network, batch):
    diffusion = bench.make_diffusion(module, network)
    with pytest.raises(ValueError, match="to unpack"):
        diffusion.sample(torch.zeros(batch, dtype=torch.long), cond_scale=1.0)


def test_for_noise_they_clip_x0_and_leave_the_noise_as_it_was(module, network):
    guidance = Guidance(3.0, (static_threshold(1.0),))
    plain = bench.without_projection(network)
    diffusion = bench.make_diffusion(module, plain, "pred_noise")
    image = ours(network, diffusion, guidance, "pred_noise")

    def clipped(label):
        shape = (1, bench.CHANNELS, bench.SIDE, bench.SIDE)
        return diffusion.ddim_sample(label, shape, cond_scale=3.0, rescaled_phi=0.0)

    assert distance(image, one_at_a_time(clipped)) > 0.1

    predictions = diffusion.model_predictions

    def consistent(x, t, *args, **kwargs):
        _, x0 = predictions(x, t, *args, **kwargs)
        return module.ModelPrediction(diffusion.predict_noise_from_start(x, t, x0), x0)

    diffusion.model_predictions = consistent
    # alpha is 5e-5 at the first step: a float32 eps says x0 to a few parts in a thousand there
    assert distance(image, one_at_a_time(clipped)) < 1e-2


def test_one_pass_over_both_kinds_of_rows_is_their_two(network):
    path = bench.Steps(torch.linspace(1, 0.01, 11, dtype=torch.float64))
    x = torch.randn(2, 3, 16, 16)
    null = torch.full_like(CLASSES, bench.CLASSES)
    both = bench.denoiser(network, path)(
        torch.cat([x, x]), torch.cat([CLASSES, null]), torch.full((4,), 0.3)
    )
    time = torch.tensor([2, 2])  # t = 0.3 of 10 steps
    theirs = [network(x, time, CLASSES, cond_drop_prob=float(drop)) for drop in (0, 1)]
    assert not torch.allclose(theirs[0], theirs[1], atol=1e-2)
    torch.testing.assert_close(both, torch.cat(theirs), atol=1e-5, rtol=1e-4)


def test_path_is_their_table_at_their_times(module, network):
    diffusion = bench.make_diffusion(module, network)
    path = bench.steps_of(diffusion)
    assert path.times(20).tolist() == pytest.approx([1 - i / 20 for i in range(21)], abs=1e-12)
    # linspace(-1, 999, 4) is -1, 332.3, 665.7, 999, and whole steps are 332 and 665
    assert path.times(3).tolist() == [1.0, 0.666, 0.333, 0.0]
    alpha, sigma = path.coefficients(torch.tensor([1.0, 0.333, 0.0], dtype=torch.float64))
    squared = diffusion.alphas_cumprod[[999, 332]].double()
    torch.testing.assert_close(alpha[:2].square(), squared)
    torch.testing.assert_close(sigma[:2].square(), 1 - squared)
    assert (float(alpha[2]), float(sigma[2])) == (1.0, 0.0)


def test_time_inverts_the_path():
    path = bench.Steps(torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64))
    ratios = torch.tensor([0.0, 0.4, 0.9, 1.5, 2.5, math.inf], dtype=torch.float64)
    # sigma / alpha is 0, 0.5, 1 and 2 at the entries
    assert path.time(ratios).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1, 1])


def test_cases_pay_for_the_rows_that_their_floor_counts(network, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 20)
    monkeypatch.setattr(bench, "make_unet", lambda module: network)
    calls = []
    network.init_conv.register_forward_hook(lambda layer, args, out: calls.append(len(out)))
    group = bench.group(2)
    a_pass = bench.operations_of_a_pass(network, CLASSES)
    seen = {}
    for name, case in group.cases.items():
        calls.clear()
        case()
        seen[name] = (len(calls), sum(calls) / 2)
    one, two = (20, 20), (20, 40)  # calls, and rows a sample
    assert seen == {
        bench.PLAIN: one,
        bench.OURS: two,
        bench.LATE: (20, 32),
        bench.REINED: two,
        bench.THEIR_UNGUIDED: one,
        bench.THEIR_PLAIN: (40, 40),
        bench.THEIRS: (40, 40),
    }
    floors = {name: value / a_pass for name, value in group.operations.items()}
    assert floors == {name: pytest.approx(rows) for name, (_, rows) in seen.items()}


def test_operations_are_multiplications_and_additions_of_every_row(network):
    once = bench.operations_of_a_pass(network, CLASSES[:1])
    assert bench.operations_of_a_pass(network, CLASSES) == 2 * once
    first = 2 * 3 * bench.DIM * 7 * 7 * 16 * 16  # the 7 x 7 convolution from the image
    assert once > first
    network.init_conv = torch.nn.Conv2d(3, bench.DIM, 1)
    assert once - bench.operations_of_a_pass(network, CLASSES[:1]) == first * 48 // 49


def test_their_package_is_not_imported(module):
    assert "denoising_diffusion_pytorch" not in sys.modules
    assert module.tqdm([1]).disable


def test_missing_peer_is_one_line(monkeypatch):
    monkeypatch.setattr(bench, "PEER", "not-a-distribution")
    with pytest.raises(SystemExit, match=r"not installed: pip install --no-deps .*==2\.3\.4$"):
        bench.main()


def test_script_writes_its_three_files(module, monkeypatch, tmp_path):
    limits = {"bytes": 1e9, "operations": 1e9}
    monkeypatch.setattr(timing, "ceilings", lambda: limits)
    monkeypatch.setattr(
        sys, "argv", ["unet.py", "--batches", "1", "--rounds", "1", "--out", str(tmp_path)]
    )
    with warnings.catch_warnings():
        bench.main()
    assert {file.name for file in tmp_path.iterdir()} == {"unet.json", "unet.md", "unet.png"}
    table = (tmp_path / "unet.md").read_text()
    assert "denoising-diffusion-pytorch 2.3.4" in table
    for name in (bench.OURS, bench.REINED, bench.THEIRS, bench.THEIR_PLAIN):
        assert f"| {name} | " in table
    assert "| guided as theirs, against theirs | " in table


def test_a_table_has_columns_for_what_is_known():
    """With steps: what one takes, and the images a second; no ceiling where none was given."""
    cases = {"a": lambda: None, "b": lambda: None}
    group = timing.Group("g", cases, ("image", 4), steps={"a": 8, "b": 2})
    lines = timing.table(group, {"a": [0.1, 0.2, 0.4], "b": [1.0]}, {"bytes": 1, "operations": 1})
    assert (
        lines[2]
        == "| case | ms per image, median (range) | steps | us per step | images a second |"
    )
    assert lines[4:6] == [
        "| a | 50.00 (25.00 to 100.00) | 8 | 25000 | 20 |",
        "| b | 250.00 (250.00 to 250.00) | 2 | 500000 | 4 |",
    ]
