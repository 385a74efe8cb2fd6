"""The examples of models that are not ours: guided in few lines, and guidance does what it says."""

import runpy
from pathlib import Path

import torch

from unicfg import Guidance

FILE = Path(__file__).parent.parent / "examples" / "own_hybrid.py"


def test_it_takes_fewer_than_40_lines_and_nothing_of_the_models():
    text = FILE.read_text()
    inside = text.split("from here ---\n")[1].split("# --- to here")[0]
    lines = len([line for line in inside.splitlines() if line.strip()])
    readme = " ".join((FILE.parent.parent / "README.md").read_text().split())
    assert lines < 40 and f"guidable in {lines} lines" in readme
    assert "from models" not in text and "tokenizers_vq import" not in text


def test_guidance_makes_words_and_pictures_right():
    """At s = 0 by chance, at 1 weakly, at 4 mostly, with letters and latents from one Guidance object."""
    example = runpy.run_path(str(FILE))
    torch.manual_seed(0)
    model = example["train"](60, torch.Generator().manual_seed(0))
    label = torch.arange(96).remainder(8)[:, None]
    right = {}
    for s in (0.0, 1.0, 4.0):
        drawn = example["sample"](model, label, Guidance(s), list(range(96)))
        right[s] = example["correct"](*drawn, label)
    for half in (0, 1):
        assert right[0.0][half] < 0.35
        assert right[1.0][half] + 0.1 < right[4.0][half]
        assert right[4.0][half] > 0.8


def test_a_gpt2_believes_what_it_reads_the_more_the_higher_the_scale(tmp_path):
    example = runpy.run_path(str(FILE.with_name("context_aware.py")))
    model = example["train"](120)
    scales = [0.0, 1.0, 2.0]
    shares = example["believes"](model, scales, 200)
    assert shares[0] < 0.1 and 0.4 < shares[1] < 0.8 and shares[2] > 0.95
    example["plot"](scales, shares, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
