"""Shards: rows on disk come back as they were, cost no memory, and are refused where they are not what they should be."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tokenizers_vq.files import write_atomically
from unicfg.training.shards import INDEX, Shards, finish_shards, is_written, write_shard

ROWS = (5, 0, 7, 3)


def tensors(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "images": torch.randint(0, 256, (n, 3, 4, 4), generator=g, dtype=torch.uint8),
        "ids": torch.randint(0, 99, (n, 6), generator=g, dtype=torch.int32),
        "latents": torch.randn(n, 2, 3, 3, generator=g),
    }


@pytest.fixture
def folder(tmp_path):
    for number, rows in enumerate(ROWS):
        write_shard(tmp_path, number, tensors(rows, number), "abc")
    finish_shards(tmp_path, len(ROWS), "abc")
    return tmp_path


def test_rows_come_back_at_random_and_by_shard(folder):
    keys = ("latents", "images", "ids")
    shards = Shards(folder, keys, "abc")
    whole = {k: torch.cat([tensors(n, i)[k] for i, n in enumerate(ROWS)]) for k in keys}
    assert len(shards) == 15 and shards.count == 4
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1)).tolist()
    for index, row in zip(order, shards.__getitems__(order), strict=True):
        for key, own in zip(keys, row, strict=True):
            assert own.dtype == whole[key].dtype and torch.equal(own, whole[key][index])
    for number, rows in enumerate(ROWS):
        for key, own in zip(keys, shards.read(number), strict=True):
            assert torch.equal(own, tensors(rows, number)[key])
    assert torch.equal(shards.first(6)[2], whole["ids"][:6])
    with pytest.raises(IndexError, match="index is 15, expected 0 to 14"):
        shards[15]
    with pytest.raises(IndexError, match="index is -1"):
        shards[-1]


def test_processes_of_a_loader_read_the_same(folder):
    shards = Shards(folder, ("ids",))
    one, two = (
        torch.cat([ids for (ids,) in DataLoader(shards, batch_size=4, num_workers=workers)])
        for workers in (0, 2)
    )
    assert len(one) == 15 and torch.equal(one, two)


def test_unfinished_shards_are_no_data(folder):
    (folder / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match=f"no {INDEX}"):
        Shards(folder, ("ids",))
    (folder / "00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no shard at .*00002"):
        finish_shards(folder, len(ROWS), "abc")


def test_rows_of_another_make_are_refused(folder):
    for action in (
        lambda: Shards(folder, ("ids",), "xyz"),
        lambda: is_written(folder, 0, "xyz"),
    ):
        with pytest.raises(
            ValueError, match=r"made from other data or by another tokenizer.*remove"
        ):
            action()
    write_shard(folder, 1, tensors(0), "xyz")  # one shard of another make among the others
    with pytest.raises(ValueError, match=r"00001\.safetensors was made from"):
        Shards(folder, ("ids",))


@pytest.mark.parametrize("cut", [1, 100, 10_000])
def test_a_shard_that_is_cut_off_is_refused(folder, cut):
    file = folder / "00002.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"00002\.safetensors"):
        Shards(folder, ("ids",))


def test_a_flipped_bit_is_found_where_a_shard_is_read_whole(folder):
    file = folder / "00002.safetensors"
    data = bytearray(file.read_bytes())
    data[-20] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"00002\.safetensors"):
        Shards(folder, ("ids",)).read(2)


def test_shards_that_do_not_fit_their_index_are_refused(folder):
    write_shard(folder, 3, tensors(9), "abc")
    with pytest.raises(ValueError, match=r"00003\.safetensors has 9 rows, its index 3"):
        Shards(folder, ("ids",))
    (folder / INDEX).write_text(json.dumps({"made_from": "abc", "rows": "many"}))
    with pytest.raises(ValueError, match="rows is 'many', expected a list"):
        Shards(folder, ("ids",))


def test_tensors_that_are_missing_or_uneven_are_refused(folder):
    with pytest.raises(ValueError, match=r"holds \[.*\], expected 'codes'"):
        Shards(folder, ("codes",))
    file = folder / "00000.safetensors"
    write_atomically(
        {"ids": torch.zeros(5, 2), "text": torch.zeros(4, 2)}, file, {"made_from": "abc"}
    )
    with pytest.raises(ValueError, match="expected as many rows each"):
        Shards(folder, ("ids",))
    write_atomically({"ids": torch.zeros(5, 2, dtype=torch.float64)}, file, {"made_from": "abc"})
    with pytest.raises(ValueError, match="ids is F64, expected one of"):
        Shards(folder, ("ids",))


def test_leftovers_of_killed_processes_are_removed_at_the_end(folder):
    (folder / ".00001.safetensors.99.tmp").write_bytes(b"half")
    finish_shards(folder, len(ROWS), "abc")
    assert sorted(os.listdir(folder)) == [*(f"0000{i}.safetensors" for i in range(4)), INDEX]


def test_reading_rows_takes_no_memory(tmp_path):
    """400 MB of shards are read at random by a process that may have 50 MB more than it began with."""
    rows = torch.zeros(1000, 50_000, dtype=torch.uint8)
    for number in range(8):
        save_file({"images": rows}, tmp_path / f"{number:05d}.safetensors", {"made_from": "abc"})
    finish_shards(tmp_path, 8, "abc")
    code = """
import random, resource, sys
from pathlib import Path
from unicfg.training.shards import Shards

shards = Shards(Path(sys.argv[1]), ("images",))
shards[0]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(500):
    shards.__getitems__(random.sample(range(8000), 32))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 50_000  # kilobytes, of 400,000 that were read


def test_shards_whose_rows_differ_are_not_finished(folder):
    write_shard(folder, 1, tensors(3) | {"ids": torch.zeros(3, 5, dtype=torch.int32)}, "abc")
    with pytest.raises(ValueError, match=r"00001\.safetensors has rows of .*\(5,\)"):
        finish_shards(folder, len(ROWS), "abc")
