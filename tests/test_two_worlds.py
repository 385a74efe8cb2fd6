"""The example of both worlds: its picture in a small size, and what it says of its toys."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from unicfg import Guidance

FILE = Path(__file__).parent.parent / "examples" / "1_two_worlds.py"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of calls on tiny tensors: a second thread takes longer to join than it helps."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(FILE))


def test_a_small_picture_is_drawn(example):
    state = torch.get_rng_state()
    picture = example["draw"](samples=40, steps=20)
    assert picture.width > 1000 and picture.height > 900
    colours = {tuple(colour) for _, colour in picture.convert("RGB").getcolors(2**20)}
    for name in ("TARGET", "DRAWN"):  # both distributions are to be seen
        wanted = bytes.fromhex(example[name][1:])
        assert min(max(abs(a - b) for a, b in zip(c, wanted, strict=True)) for c in colours) < 24
    assert torch.equal(torch.get_rng_state(), state)


def test_the_words_tell_the_target_from_what_is_drawn(example):
    """The target prefers "ac"; token by token "b" comes first, for what follows is not known yet."""
    words = example["WORDS"]
    assert int(words.sharpened(0, 7.0).argmax()) == 2  # aa, ab, ac
    assert float(words.guided(0, Guidance(7.0))[3:6].sum()) > 0.8  # ba, bb, bc


def test_the_tree_has_two_classes_and_its_own_samples_keep_every_branch(example):
    toy = example["tree"]()
    assert toy.classes == 2
    one, other = (toy.sample(2000, torch.Generator().manual_seed(i), 0) for i in (0, 1))
    assert example["branches_kept"](toy, one, other) == (15, 15)
    left_out = one[one[:, 0] < one[:, 0].median()]
    assert example["branches_kept"](toy, left_out, other)[0] < 12


def test_training_is_the_same_twice_and_leaves_global_random_state_alone(example):
    toy = example["tree"]()
    state = torch.get_rng_state()
    one, two = (example["train"](toy, 8, 1, 1, 3, seed=0) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_committed_picture_is_small_and_the_command_explains_itself():
    picture = FILE.parent.parent / "docs" / "pictures" / "two-worlds.png"
    assert picture.stat().st_size < 250_000
    with Image.open(picture) as opened:
        assert opened.width > 1000
    told = subprocess.run([sys.executable, FILE, "--help"], capture_output=True, text=True)
    assert told.returncode == 0 and "--out" in told.stdout
