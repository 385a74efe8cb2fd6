"""Broken files, by the thousand: every loader reads them right, skips and counts them, or says what is wrong.

A case is a function of its loader and its number alone, so what a failure prints can be run again:

    python -c "import sys; sys.path.insert(0, 'tests'); import test_fuzz; test_fuzz.again('recipe', 17)"
"""

import io
import json
import math
import os
import random
import resource
import struct
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import pipeline

import models
import tokenizers_vq
import unicfg
from models import TextToImage
from models.labels import ClassLabels
from tokenizers_vq import VQTokenizer, VQTokenizerConfig
from tokenizers_vq.files import CHECKSUM, read_tensors
from unicfg import Guidance
from unicfg.evaluation.prompts import read_prompts
from unicfg.evaluation.results import Cell, CellResult, Estimate, Results
from unicfg.evaluation.study import Study, read_study
from unicfg.generation import _fitting, draw_folder
from unicfg.guidance.spelling import SCHEDULES, read_guidance
from unicfg.training.checkpoint import Checkpoints
from unicfg.training.data import read_folder
from unicfg.training.recipe import Recipe, load_recipe

# what a loader may raise; a subclass says less than it could (JSONDecodeError: of which file?)
ALLOWED = {ValueError, TypeError, FileNotFoundError, OSError}
# and where: a line that says "raise", so that the words are ours
PACKAGES = tuple(f"{Path(own.__file__).parent}{os.sep}" for own in (unicfg, tokenizers_vq, models))
SLOWEST = 5.0  # seconds of a case
MEMORY = 500 << 20  # bytes that all cases of a loader may add to the peak

Files = dict[str, bytes]


@dataclass(frozen=True)
class Loader:
    """What is fuzzed: whole files to start from, which of them to break, and how they are read.

    ``read`` raises AssertionError where what was accepted is not well-formed, and returns whether something was left out.
    """

    files: Callable[[], Files]
    read: Callable[[Path, random.Random], bool | None]
    broken: Callable[[str], bool] = lambda name: True


# Files to start from


def written(write: Callable[[Path], None]) -> Files:
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch))
        found = [own for own in Path(scratch).rglob("*") if own.is_file()]
        return {own.relative_to(scratch).as_posix(): own.read_bytes() for own in sorted(found)}


def unsigned(files: Files) -> Files:
    """The same with safetensors as other tools write them, without a checksum: what is broken in them is not noticed."""

    def write(folder: Path) -> None:
        for name, content in files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
            if name.endswith(".safetensors"):
                tensors, metadata = read_tensors(file)
                held = {key: text for key, text in metadata.items() if key != CHECKSUM}
                from safetensors.torch import save_file

                save_file({k: v.clone() for k, v in tensors.items()}, file, held)

    return written(write)


@cache
def a_pipeline() -> Files:
    def write(folder: Path) -> None:
        for family in ("ar", "flow"):
            pipeline(family=family).save_pretrained(folder)

    return written(write)


@cache
def a_checkpoint() -> Files:
    tensors = {"model/w": torch.arange(12.0).view(3, 4), "optimizer 0/0/step": torch.tensor(3.0)}

    def write(folder: Path) -> None:
        Checkpoints(folder).save(3, tensors, {"steps": 9, "betas": [0.9, 0.95]})
        Checkpoints(folder).save(6, tensors, {"steps": 9, "betas": [0.9, 0.95]})

    return written(write)


RECIPE = """\
out: runs/x
data: {source: folder, path: data/x, image_size: 32, validation: 0.1}
tokenizer:
  levels: [8, 5, 5]  # 200 codes
  training: &base {steps: 100, betas: [0.9, 0.95], learning_rate: 1.0e-3, precision: null}
text: {kind: bpe, vocabulary: 300, length: 12}
model:
  family: ar
  width: 32
  noise: {path: cosine, min_snr: 5}
families:
  flow: {patch: 2, training: {<<: *base, steps: !!int 7}}
prompts: [a red circle, "a blue\\tsquare"]
"""
STUDY = """\
weights: shapes
data: shapes
n: 20
families: [ar, flow]
scales: [0, 1.0, 3]
variants:
  - {name: plain}
  - {name: late, scale: "interval(s, 0.5, 1)", mitigations: "tcfg + mimic_scale(3)", scales: [3]}
  - {name: cold, sampler: {temperature: 0.5, steps: 8, solver: heun}}
open_prompts: [a red circle]
"""
SPELLINGS = (
    "interval(linear(1, 2 * s), 0.3, 1.0)",
    "table([1, s, -3.5e2 / 2])",
    "power_cosine(s, 2)",
    "4.0",
)
MITIGATIONS = ("tcfg + mimic_scale(3)", "rescale(0.7) + kl_trust_region(0.5)", "")


def pictures() -> Files:
    def encoded(mode: str, kind: str, **options) -> bytes:
        noise = random.Random(0).randbytes(9 * 7 * 3)
        image = Image.frombytes("RGB", (9, 7), noise)
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
        held = io.BytesIO()
        image.save(held, kind, **options)
        return held.getvalue()

    exif = Image.Exif()
    exif[0x0112] = 6
    more = [Image.new("RGB", (9, 7), "blue")]
    made = {
        "a.png": encoded("RGBA", "PNG", exif=exif),
        "b.jpg": encoded("RGB", "JPEG", exif=exif),
        "c.webp": encoded("RGB", "WEBP", save_all=True, append_images=more),
        "d.bmp": encoded("P", "BMP"),
        "e.png": encoded("RGB", "PNG", save_all=True, append_images=more),
        "f.jpg": encoded("CMYK", "JPEG", progressive=True),
        "g.gif": encoded("P", "GIF", save_all=True, append_images=more),
        "h.tiff": encoded("I;16", "TIFF"),
        "i.png": encoded("LA", "PNG"),
        "j.tiff": encoded("RGB", "TIFF", compression="tiff_lzw"),
    }
    return made


@cache
def a_folder() -> Files:
    files = pictures()
    rows = [
        {"file_name": name, "text": f"picture {i}", "split": "train", "tags": ["x", {"y": i}]}
        for i, name in enumerate(files)
    ]
    return files | {"metadata.jsonl": "\n".join(map(json.dumps, rows)).encode()}


@cache
def a_table() -> Files:
    files = pictures()
    lines = [f'{name},"picture, ""{i}""",train' for i, name in enumerate(files)]
    return files | {"metadata.csv": "\r\n".join(["file_name,text,split", *lines]).encode()}


@cache
def with_captions() -> Files:
    files = {name: pictures()[name] for name in ("a.png", "b.jpg", "d.bmp")}
    return files | {f"{name[0]}.txt": f"picture {name}".encode() for name in files}


@cache
def a_study() -> Files:
    variants = {"plain": {"name": "plain", "scale": "s", "mitigations": "", "scales": []}}
    settings = {"families": ["ar", "flow"], "scales": [1.0, 3.0], "variants": variants}
    settings |= {"format_version": 1, "sources": {"ar": "x", "flow": "x"}, "prompts": ["a", "b"]}
    settings |= {"study": {"weights": "shapes", "n": 2, "variants": [*variants.values()]}}
    files = {"study.json": json.dumps(settings, indent=1).encode()}
    numbers = {"kid": Estimate(0.1, math.nan, 20), "vendi": Estimate(2.5, 0.1, 20)}
    for family in ("ar", "flow"):
        for s in (1.0, 3.0):
            cell = Cell(family, "plain", s)
            trace = {"progress": [0.0, 1.0], "kl": [0.1, 0.2]}
            result = CellResult(cell, numbers, {"fd": "too few"}, trace, None, "made", "x")
            files[f"{cell.folder}/cell.json"] = json.dumps(result.to_json()).encode()
    held = {
        "made_with": "x",
        "measures": {"real images": {"kid": {"value": 1, "error": None, "n": 3}}},
    }
    return files | {"reference.json": json.dumps(held).encode()}


@cache
def drawn() -> Files:
    def write(folder: Path) -> None:
        draw_folder(pipeline(), ["a red circle", "two"], folder, n=2, command="x", progress=False)

    return written(write)


# How they are read


def read_pipeline(folder: Path, chance: random.Random) -> None:
    family = chance.choice(["ar", "flow"])
    pipe = TextToImage.from_pretrained(folder, family)
    assert pipe.text.encode(["a tiger"]).shape == (1, 12)
    if chance.random() < 0.2:
        try:
            images = pipe.sample(["a tiger"], seeds=[0], guidance=Guidance(2.0))
        except (ValueError, FloatingPointError) as error:
            assert "NaN" in str(error) or "inf" in str(error), error  # of weights that are broken
        else:
            assert images.shape == (1, 3, 16, 16)
            assert images.isfinite().all() and images.abs().max() <= 1


def read_tokenizer(folder: Path, chance: random.Random) -> None:
    tokenizer = VQTokenizer.from_pretrained(folder / "tokenizer")
    size = tokenizer.config.image_size
    if size <= 64:
        ids = torch.zeros(1, tokenizer.grid(size), tokenizer.grid(size), dtype=torch.long)
        assert tokenizer.decode(ids).shape == (1, 3, size, size)


def read_checkpoints(folder: Path, chance: random.Random) -> bool:
    found = Checkpoints(folder).load()
    if found is not None:
        step, tensors, settings = found
        assert step >= 0 and isinstance(settings, dict)
        assert all(isinstance(own, torch.Tensor) for own in tensors.values())
    return found is None or found[0] != 6


def read_classes(folder: Path, chance: random.Random) -> None:
    from models.labels import load_prompt_encoder

    encoder = load_prompt_encoder(folder / "text.json")
    shape = encoder.encode(encoder.decode(encoder.null_condition[None])[:0]).shape
    assert shape[0] == 0 and encoder.vocabulary >= 2


def read_captions(folder: Path, chance: random.Random) -> None:
    from models.labels import load_prompt_encoder

    encoder = load_prompt_encoder(folder / "text.json")
    ids = encoder.encode(["a red circle", "\u00fc\U0001f600\0", "", "x" * 3000])
    assert ids.shape == (4, encoder.length)
    assert int(ids.min()) >= 0 and int(ids.max()) < encoder.vocabulary
    encoder.decode(ids)


def read_recipe(folder: Path, chance: random.Random) -> None:
    recipe = load_recipe(folder / "recipe.yaml", chance.choice([None, "flow", "ar"]))
    assert isinstance(recipe, Recipe)
    assert recipe.model.training.steps >= 1
    assert math.isfinite(recipe.model.training.learning_rate)


def read_images(folder: Path, chance: random.Random) -> bool:
    images = read_folder(folder, 6, progress=False)
    assert images.images.shape == (len(images.captions), 3, 6, 6)
    assert all(caption.strip() and caption.encode() for caption in images.captions)
    images.split(0.5)
    return bool(images.skipped)


def read_lines(folder: Path, chance: random.Random) -> None:
    prompts = read_prompts(folder / "prompts.txt")
    assert prompts and all(isinstance(own, str) and own for own in prompts)


def read_plan(folder: Path, chance: random.Random) -> None:
    for name in ("study.yaml", "study.json"):
        if (folder / name).is_file():
            study = read_study(folder / name)
            assert isinstance(study, Study) and all(map(math.isfinite, study.scales))


def read_results(folder: Path, chance: random.Random) -> None:
    results = Results.load(folder)
    for own in results.cells:
        assert math.isfinite(own.cell.s)
        assert CellResult.from_json(json.loads(json.dumps(own.to_json()))).cell == own.cell


def read_drawn(folder: Path, chance: random.Random) -> None:
    new = json.loads(drawn()["settings.json"])
    both = _fitting(folder, new)
    assert set(new["prompts"]) <= set(both["prompts"]) and all(map(math.isfinite, both["scales"]))
    assert both["n"] >= 2 and isinstance(both["seed"], int)


def read_spelling(folder: Path, chance: random.Random) -> None:
    for file in sorted(folder.iterdir()):
        text = file.read_bytes().decode("utf-8", "replace")
        texts = (text, "") if file.name.startswith("scale") else ("s", text)
        guidance = read_guidance(texts[0], 3.0, texts[1])
        for progress in (0.0, 0.4, 1.0):
            try:
                assert math.isfinite(float(guidance.scale_at(progress)))
            except ValueError as error:
                assert "finite" in str(error)


def under(*starts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(starts)


LOADERS = {
    "pipeline": Loader(a_pipeline, read_pipeline),
    "pipeline, no checksum": Loader(cache(lambda: unsigned(a_pipeline())), read_pipeline),
    "tokenizer": Loader(a_pipeline, read_tokenizer, under("tokenizer/")),
    "captions": Loader(a_pipeline, read_captions, under("text.json")),
    "classes": Loader(
        cache(lambda: written(lambda out: ClassLabels(["cat", "dog"]).save(out / "text.json"))),
        read_classes,
    ),
    "checkpoints": Loader(a_checkpoint, read_checkpoints),
    "checkpoints, no checksum": Loader(cache(lambda: unsigned(a_checkpoint())), read_checkpoints),
    "recipe": Loader(lambda: {"recipe.yaml": RECIPE.encode()}, read_recipe),
    "folder, jsonl": Loader(a_folder, read_images, under("metadata")),
    "folder, csv": Loader(a_table, read_images, under("metadata")),
    "folder, txt": Loader(with_captions, read_images, lambda name: name.endswith(".txt")),
    "pictures": Loader(a_folder, read_images, lambda name: name != "metadata.jsonl"),
    "prompts": Loader(lambda: {"prompts.txt": "a red circle\n\u00fc\n\n".encode()}, read_lines),
    "study, yaml": Loader(lambda: {"study.yaml": STUDY.encode()}, read_plan),
    "study, json": Loader(a_study, read_plan, under("study.json")),
    "results": Loader(a_study, read_results),
    "drawn images": Loader(drawn, read_drawn, under("settings.json")),
    "spelling": Loader(
        lambda: {
            **{f"scale {i}": text.encode() for i, text in enumerate(SPELLINGS)},
            **{f"reins {i}": text.encode() for i, text in enumerate(MITIGATIONS)},
        },
        read_spelling,
    ),
}
# cases in the slow run, in proportion to what a case costs
CASES = {
    "pipeline": 700,
    "pipeline, no checksum": 800,
    "tokenizer": 800,
    "captions": 1500,
    "classes": 500,
    "checkpoints": 800,
    "checkpoints, no checksum": 800,
    "recipe": 2000,
    "folder, jsonl": 700,
    "folder, csv": 700,
    "folder, txt": 300,
    "pictures": 1500,
    "prompts": 500,
    "study, yaml": 1000,
    "study, json": 700,
    "results": 1500,
    "drawn images": 1500,
    "spelling": 2000,
}

# Breaking them

ODD = (
    None,
    True,
    -1,
    0,
    1,
    3,
    2**31,
    2**63,
    10**12,
    10**400,
    -0.5,
    1e308,
    math.nan,
    math.inf,
    "",
    "x",
)
ODD += (
    "../../x",
    "/etc/passwd",
    "\0",
    "\ud800",
    "a" * 5000,
    [],
    [[[]]],
    {},
    {"a": [1]},
    [1, "a", None],
)


def flip(content: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 1, 8])):
        if content:
            content[place(content, chance)] ^= 1 << chance.randrange(8)


def insert(content: bytearray, chance: random.Random) -> None:
    at = place(content, chance)
    content[at:at] = chance.choice(
        [
            chance.randbytes(chance.choice([1, 4, 50])),
            b"\0",
            b"[" * 2000,
            b'"',
            b"\xff\xfe",
            b"9" * 5000,
        ]
    )


def delete(content: bytearray, chance: random.Random) -> None:
    at = place(content, chance)
    del content[at : at + chance.choice([1, 1, 8, 100])]


def truncate(content: bytearray, chance: random.Random) -> None:
    del content[chance.randrange(len(content) + 1) :]


def splice(content: bytearray, chance: random.Random) -> None:
    start, at = place(content, chance), place(content, chance)
    piece = content[start : start + chance.choice([2, 20, 200])]
    content[at : at + chance.choice([0, len(piece)])] = piece


def overwrite(content: bytearray, chance: random.Random) -> None:
    """A number of the file by an odd one: lengths, offsets, sizes."""
    at = place(content, chance)
    value = chance.choice([0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF])
    packed = struct.pack(chance.choice("<>") + "Q", value)
    width = chance.choice([1, 2, 4, 8])
    content[at : at + width] = packed[:width]


def place(content: bytearray, chance: random.Random) -> int:
    """Somewhere, and rather near the beginning, where the headers are."""
    end = len(content) if chance.random() < 0.5 else min(len(content), 300)
    return chance.randrange(end + 1) if end == 0 else chance.randrange(end)


def replace_values(content: bytes, chance: random.Random) -> bytes | None:
    """The same JSON or YAML with some values, keys or entries replaced; None if it is neither."""
    try:
        text = content.decode()
        tree = json.loads(text) if text.lstrip()[:1] in "{[" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError):
        return None
    if not isinstance(tree, dict | list) or not tree:
        return None
    parts = [tree]
    for part in parts:
        inner = part.values() if isinstance(part, dict) else part
        parts += [own for own in inner if isinstance(own, dict | list) and own]
        if len(parts) > 400:
            break
    for _ in range(chance.choice([1, 1, 2, 4])):
        part = chance.choice(parts)
        if not part:
            continue
        key = chance.choice([*part]) if isinstance(part, dict) else chance.randrange(len(part))
        what = chance.randrange(5)
        if what == 0:
            del part[key]
        elif what == 1 and isinstance(part, dict):
            part[chance.choice(["x", "", "format_version", "Regex"])] = part.pop(key)
        elif what == 2 and isinstance(part[key], int) and not isinstance(part[key], bool):
            part[key] += chance.choice([-1, 1, 7, 10**6])
        else:
            part[key] = chance.choice(ODD)
    return json.dumps(tree).encode()


EDITS = (flip, insert, delete, truncate, splice, overwrite)


def mutated(content: bytes, chance: random.Random) -> bytes:
    if chance.random() < 0.5:
        if content[8:9] == b"{":  # safetensors: the header is JSON behind its length
            length = int.from_bytes(content[:8], "little")
            header = replace_values(content[8 : 8 + length], chance)
            if header is not None:
                return struct.pack("<Q", len(header)) + header + content[8 + length :]
        lines = content.split(b"\n")
        at = chance.randrange(len(lines))
        line = replace_values(lines[at], chance) if len(lines) > 1 else None
        if line is not None:  # JSON a line
            return b"\n".join([*lines[:at], line, *lines[at + 1 :]])
        whole = replace_values(content, chance)
        if whole is not None:
            return whole
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 3])):
        chance.choice(EDITS)(changed, chance)
    return bytes(changed)


# Running them


WHATS = ("accepted", "skipped", "refused")


@dataclass
class Outcome:
    """What came of a case: accepted, skipped or refused; the error, if any; and what went wrong."""

    what: str
    error: str | None = None
    wrong: str | None = None


def run(name: str, number: int, folder: Path) -> Outcome:
    """One case, in a folder that holds the whole files of its loader before and after."""
    loader, chance = LOADERS[name], random.Random(f"{name} {number}")
    files = loader.files()
    which = chance.choice([own for own in sorted(files) if loader.broken(own)])
    (folder / which).write_bytes(mutated(files[which], chance))
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = Outcome("skipped" if loader.read(folder, chance) else "accepted")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        outcome = Outcome("refused", f"{type(error).__name__}: {error}", wrong_with(error))
    finally:
        (folder / which).write_bytes(files[which])
    if time.perf_counter() - start > SLOWEST:
        outcome.wrong = f"it took {time.perf_counter() - start:.1f} s"
    return outcome


def wrong_with(error: BaseException) -> str | None:
    """Why an error does not say what is wrong with a file; None if it does."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(PACKAGES) and (last.line or "").startswith("raise ")
    if type(error) not in ALLOWED or not (ours or getattr(error, "filename", None)):
        return "".join(traceback.format_exception(error))
    if not 10 < len(str(error)) < 2000:
        return f"an error of {len(str(error))} characters"
    return None


def whole(name: str, folder: Path) -> None:
    for file, content in LOADERS[name].files().items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)


def again(name: str, number: int) -> None:
    """Show one case."""
    with tempfile.TemporaryDirectory() as scratch:
        whole(name, Path(scratch))
        outcome = run(name, number, Path(scratch))
        print(outcome.error, outcome.wrong, sep="\n")


def campaign(name: str, numbers: range, folder: Path) -> tuple[Counter[str], list[str]]:
    """How many cases were accepted and refused, and what went wrong."""
    whole(name, folder)
    warnings.simplefilter("ignore")
    assert not LOADERS[name].read(folder, random.Random(0)), "of whole files something is left out"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    entries = set(folder.parent.rglob("*"))
    counts: Counter[str] = Counter()
    wrong = []
    for number in numbers:
        outcome = run(name, number, folder)
        counts[outcome.what] += 1
        if outcome.wrong is not None:
            wrong.append(f"again({name!r}, {number}): {outcome.wrong}")
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    if added << 10 > MEMORY:
        wrong.append(f"{name}: the cases took {added >> 10} MB more at their peak")
    left = set(folder.parent.rglob("*"))
    if left != entries:
        wrong.append(f"{name}: files were written: {left - entries}")
    return counts, wrong


@pytest.mark.parametrize("name", LOADERS)
def test_some_broken_files_of_every_loader(name, tmp_path):
    """The first cases of each."""
    count = 10 if name.startswith(("pipeline", "tokenizer")) else 30
    _, wrong = campaign(name, range(count), tmp_path / "files")
    assert not wrong, "\n\n".join(wrong)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_thousand_broken_files(tmp_path, record_property):
    total: Counter[str] = Counter()
    wrong = []
    for i, (name, count) in enumerate(CASES.items()):
        counts, own = campaign(name, range(count), tmp_path / f"{i}" / "files")
        wrong += own
        total += counts
        # what breaks nothing, and what breaks all, tests little
        assert counts["accepted"] and counts["skipped"] + counts["refused"], (name, counts)
    came = ", ".join(f"{total[what]:,} {what}" for what in WHATS)
    record_property(
        "measured",
        f"{sum(CASES.values()):,} cases of {len(CASES)} loaders, {len(wrong)} wrong: {came}",
    )
    assert not wrong, "\n\n".join(wrong[:20])
    assert sum(CASES.values()) >= 10_000


# Generated from the grammar of a file, where mutation would seldom get past its first check

SMALL = st.integers(-2, 40)
HEADERS = st.dictionaries(
    st.sampled_from(["a", "b", "c", "__metadata__", ""]),
    st.one_of(
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I64", "BOOL", "F4", "x"]),
                "shape": st.lists(SMALL | st.sampled_from([2**31, 2**62, 2**64]), max_size=4),
                "data_offsets": st.lists(SMALL, min_size=1, max_size=3),
            }
        ),
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | SMALL, max_size=2),
        st.none(),
    ),
    max_size=4,
)


@given(header=HEADERS, data=st.binary(max_size=48), trailing=st.sampled_from(["", " ", "\0"]))
def test_headers_of_safetensors(header, data, trailing):
    text = (json.dumps(header) + trailing).encode()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "x.safetensors"
        file.write_bytes(struct.pack("<Q", len(text)) + text + data)
        try:
            tensors, metadata = read_tensors(file)
        except ValueError as error:
            assert type(error) is ValueError and "x.safetensors" in str(error)
        else:
            assert sum(own.nbytes for own in tensors.values()) == len(data)
            assert all(isinstance(own, str) for own in metadata.values())


@given(
    field=st.sampled_from([own.name for own in fields(VQTokenizerConfig)] + ["x"]),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
        max_leaves=5,
    ),
)
def test_values_of_a_configuration(field, value):
    values = json.loads(a_pipeline()["tokenizer/config.json"]) | {field: value}
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(values))
        (Path(scratch) / "model.safetensors").write_bytes(
            a_pipeline()["tokenizer/model.safetensors"]
        )
        try:
            tokenizer = VQTokenizer.from_pretrained(scratch)
        except ValueError as error:
            assert type(error) is ValueError and scratch in str(error)
        else:
            # of the fields that shape nothing here
            assert getattr(tokenizer.config, field) == value or field == "levels"


TERMS = st.recursive(
    st.sampled_from(
        ["s", "inf", "x", "0", "1", "0.5", "-3", "1e308", "1e999", "9" * 400, "'a'", "[]"]
    ),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(["+", "-", "*", "/", "**", ","]), inner).map(" ".join),
        inner.map("-{}".format),
        st.tuples(st.sampled_from([*SCHEDULES, "open", "s.real"]), st.lists(inner, max_size=3)).map(
            lambda call: f"{call[0]}({', '.join(call[1])})"
        ),
        st.lists(inner, max_size=4).map(lambda own: f"[{', '.join(own)}]"),
    ),
    max_leaves=8,
)


@given(text=TERMS)
def test_spellings(text):
    try:
        guidance = read_guidance(text, 3.0)
        scale = guidance.scale_at(0.3)
    except ValueError as error:
        assert type(error) is ValueError and str(error)
    else:
        assert math.isfinite(float(scale))
