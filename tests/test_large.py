"""A hundred thousand images: what they cost in memory and time. Minutes; run by make test-slow."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from contextlib import suppress

import psutil
import pytest
from PIL import Image
from test_training import write_recipe

from unicfg.training.shapes import Shapes
from unicfg.training.shards import Shards

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

COUNT = 100_000
MOST = 2_000_000_000  # bytes of memory
STEPS = {"steps": 40, "batch_size": 32, "sample_every": 40, "checkpoint_every": 20}


def write_tars(folder, count, each=10_000):
    """Tar files of PNGs with captions; 500 scenes, again and again."""
    folder.mkdir()
    shapes, drawn = Shapes(size=32), []
    for i in range(500):
        image, caption, _ = shapes.draw(i)
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "PNG")
        drawn.append((file.getvalue(), caption.encode()))
    for part in range(count // each):
        with tarfile.open(folder / f"{part:03d}.tar", "w") as tar:
            for i in range(part * each, (part + 1) * each):
                for suffix, data in zip(("png", "txt"), drawn[i % 500], strict=True):
                    member = tarfile.TarInfo(f"{i:06d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder


def memory(pid):
    """Bytes of a process and of those that it has started, pages that they share counted once."""
    total = 0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        for own in (process, *process.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += own.memory_full_info().pss
    return total


@pytest.mark.parametrize("source", ["shapes of 64 px", "tar files of 32 px"])
def test_a_hundred_thousand_images_train_in_bounded_memory(tmp_path, source, record_property):
    data = {"source": "shapes", "image_size": 64, "count": COUNT, "validation": 0.02}
    if source.startswith("tar"):
        path = f"{write_tars(tmp_path / 'data', COUNT)}/*.tar"
        data = {"source": "datasets", "format": "webdataset", "path": path, "image": "png"}
        data |= {"caption": "txt", "image_size": 32, "validation": 0.02}
    recipe = write_recipe(
        tmp_path,
        {
            "out": str(tmp_path / "run"),
            "data": data,
            "tokenizer": {"factor": 8, "width": 16, "depth": 1, "training": dict(STEPS)},
            "text": {"vocabulary": 300, "length": 16},
            "model": {"width": 32, "depth": 2, "heads": 2, "training": dict(STEPS)},
        },
    )
    bars = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    began = time.perf_counter()
    command = [sys.executable, "-m", "unicfg", "train", str(recipe)]
    log, peak = tmp_path / "log", 0
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=bars) as process,
    ):
        while process.poll() is None:
            peak = max(peak, memory(process.pid))
            time.sleep(0.2)
    told = log.read_text()
    assert process.returncode == 0, told[-2000:]
    assert peak < MOST
    codes = [Shards(folder, ("ids",)) for folder in (tmp_path / "run/codes").iterdir()]
    assert sum(map(len, codes)) == COUNT
    rates = [
        json.loads(line)["samples_per_second"]
        for part in ("tokenizer", "ar")
        for line in (tmp_path / f"run/logs/{part}/metrics.jsonl").read_text().splitlines()
        if "samples_per_second" in line
    ]
    speeds = re.findall(r"(reading images|encoding train images): 100%.*?([\d.]+)image/s\]", told)
    record_property(
        "measured",
        f"peak {peak / 1e9:.2f} GB, {time.perf_counter() - began:.0f} s in all; "
        f"{'; '.join(f'{what} {rate}/s' for what, rate in dict(speeds).items())}; "
        f"training the tiny tokenizer and model {rates[1]:.0f} and {rates[-1]:.0f} images/s",
    )
