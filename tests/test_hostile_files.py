"""Files from strangers: broken and hostile ones are refused by name, and nothing runs, grows without bound or leaves its folder."""

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import read, save
from PIL import Image
from safetensors.torch import save_file
from tiny import pipeline, transformer
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers

import tokenizers_vq.files
from models import TextToImage, TokenTransformer, TokenTransformerConfig
from models.folders import held_families
from models.labels import ClassLabels, load_prompt_encoder
from models.text import TextTokenizer
from tokenizers_vq import VQTokenizer, VQTokenizerConfig
from tokenizers_vq.files import (
    CHECKSUM,
    load_tensors,
    read_json,
    read_tensors,
    replace_whole,
    write_atomically,
)
from tokenizers_vq.hub import load_weights
from unicfg.evaluation.prompts import read_prompts
from unicfg.evaluation.results import Results, read_settings
from unicfg.evaluation.study import read_study
from unicfg.pictures import save_picture
from unicfg.training.recipe import load_recipe

ROOT = Path(__file__).parent.parent
RED, WHITE = [255, 0, 0], [255, 255, 255]


@pytest.fixture
def weights(tmp_path):
    """A small pipeline of the family ar, in a folder."""
    pipeline().save_pretrained(tmp_path / "weights")
    return tmp_path / "weights"


def change(file: Path, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


# Checksums


def test_a_flipped_bit_in_any_byte_of_a_file_of_ours_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"
    tensors = {
        "half": torch.arange(5).half(),
        "brain": torch.ones(3, dtype=torch.bfloat16),
        "number": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    write_atomically(tensors, file, {"step": "12"})
    found, metadata = read_tensors(file)
    assert metadata["step"] == "12" and len(metadata[CHECKSUM]) == 64
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    whole = file.read_bytes()
    unnoticed = []
    for at in range(len(whole)):
        broken = bytearray(whole)
        broken[at] ^= 1 << (at * 5 % 8)
        file.write_bytes(broken)
        try:
            again, metadata = read_tensors(file)
        except ValueError as error:
            assert str(file) in str(error)
        else:
            unnoticed.append(at)
            # only the name of the checksum itself: then it counts as a file without one
            assert CHECKSUM not in metadata and metadata["step"] == "12"
            assert all(torch.equal(again[name], own) for name, own in tensors.items())
    start = whole.index(CHECKSUM.encode())
    assert set(unnoticed) <= set(range(start, start + len(CHECKSUM)))


def test_a_damaged_file_is_called_so_and_files_without_a_checksum_are_read(weights, tmp_path):
    file = weights / "ar" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged: its sha256"):
        TextToImage.from_pretrained(weights)
    model = transformer()
    other = tmp_path / "other.safetensors"
    save_file({k: v.clone() for k, v in model.state_dict().items()}, other)
    load_weights(model, other)
    assert read_tensors(other)[1] == {}


def test_a_file_takes_its_place_whole_and_need_not_wait_for_the_disk(tmp_path, monkeypatch):
    def half(beside):
        beside.write_text("ha")
        raise OSError("No space left")

    file = tmp_path / "new" / "a.txt"
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("waited for the disk"))
    replace_whole(file, lambda beside: beside.write_text("whole"), to_disk=False)
    with pytest.raises(OSError, match=r"could not write .*a\.txt: No space left"):
        replace_whole(file, half)
    assert [own.name for own in file.parent.iterdir()] == ["a.txt"]
    assert file.read_text() == "whole"


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".WEBP", ".pdf"])
def test_a_picture_takes_its_place_whole(tmp_path, monkeypatch, suffix):
    file = tmp_path / f"a{suffix}"
    save_picture(square(), file)
    before = file.read_bytes()

    def broken(image, beside, kind):
        Path(beside).write_bytes(b"half")
        raise OSError("No space left")

    monkeypatch.setattr(Image.Image, "save", broken)
    with pytest.raises(OSError, match=r"could not write .*: No space left"):
        save_picture(square(colour="blue"), file)
    assert file.read_bytes() == before and os.listdir(tmp_path) == [file.name]


def test_what_is_written_is_on_the_disk_before_it_is_renamed_and_its_folder_after(
    tmp_path, monkeypatch
):
    calls = []
    replace, fsync = os.replace, os.fsync

    def synced(handle):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def replaced(before, after):
        calls.append("replace")
        replace(before, after)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    write_atomically({"a": torch.ones(2)}, tmp_path / "a.safetensors", {})
    tokenizers_vq.files.write_text_atomically("x", tmp_path / "a.txt")
    beside = [f".{name}.{os.getpid()}.tmp" for name in ("a.safetensors", "a.txt")]
    assert calls == [beside[0], "replace", tmp_path.name, beside[1], "replace", tmp_path.name]
    assert sorted(own.name for own in tmp_path.iterdir()) == ["a.safetensors", "a.txt"]


# Configurations

SIZES = [10**12, 10**9, 10**400, 0, -1, 1.5, float("nan"), "64", None, True, [64], [[64]], {"a": 1}]


@pytest.mark.parametrize("field", ["width", "depth", "heads", "grid", "condition_vocabulary"])
@pytest.mark.parametrize("value", SIZES, ids=lambda v: f"{v!r:.12}")
def test_absurd_sizes_of_a_network_are_refused_by_name(weights, field, value):
    with_digits = sys.get_int_max_str_digits()
    change(weights / "ar" / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"ar/config\.json: .*{field}"):
        TokenTransformer.from_pretrained(weights / "ar")
    assert sys.get_int_max_str_digits() == with_digits


@pytest.mark.parametrize(
    "field", ["image_size", "factor", "width", "depth", "codebook_size", "codebook_dim", "levels"]
)
@pytest.mark.parametrize("value", SIZES, ids=lambda v: f"{v!r:.12}")
def test_absurd_sizes_of_a_tokenizer_are_refused_by_name(weights, field, value):
    if (field, value) == ("levels", [64]):
        value = [64] * 9  # a list of ints is right there: but not for that many codes
    change(weights / "tokenizer" / "config.json", **{field: value})
    with pytest.raises(ValueError, match=rf"tokenizer/config\.json: .*{field}"):
        VQTokenizer.from_pretrained(weights / "tokenizer")


def test_a_configuration_made_in_python_is_checked_too():
    with pytest.raises(TypeError, match="width is '64', expected an int"):
        TokenTransformerConfig(width="64")
    with pytest.raises(TypeError, match="depth is True, expected an int"):
        VQTokenizerConfig(depth=True)
    with pytest.raises(ValueError, match=r"grid is 1000000, expected .* at most 256"):
        TokenTransformerConfig(grid=10**6)


def test_whole_numbers_of_numpy_are_ints(tmp_path):
    config = VQTokenizerConfig(
        width=np.int64(16), depth=np.int32(1), levels=(np.int64(5), 5), image_size=np.uint8(16)
    )
    assert config == VQTokenizerConfig(width=16, depth=1, levels=(5, 5), image_size=16)
    VQTokenizer(config).save_pretrained(tmp_path)
    assert VQTokenizer.from_pretrained(tmp_path).config == config
    for value in (np.bool_(True), np.float64(16)):
        with pytest.raises(TypeError, match=r"width is .*, expected an int"):
            VQTokenizerConfig(width=value)


def test_unknown_and_missing_keys(weights):
    file = weights / "ar" / "config.json"
    values = json.loads(file.read_text())
    change(file, colour="red")
    with pytest.raises(ValueError, match=r"config\.json: .*colour"):
        TextToImage.from_pretrained(weights)
    file.write_text(json.dumps({k: v for k, v in values.items() if k != "width"}))
    # the default is another width: the weights do not fit, which is seen in their header
    with pytest.raises(ValueError, match=r"has shape .* TokenTransformer expects"):
        TextToImage.from_pretrained(weights)


LIMITED = """
import resource, sys
sys.path.insert(0, "tests")
import {module}
resource.setrlimit(resource.RLIMIT_AS, (size := {now} + ({most} << 20), size))
{code}
"""


def run_limited(code: str, module: str, most: int = 500) -> str:
    """What a program prints that may allocate so many megabytes beyond its imports."""
    now = "int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()"
    program = LIMITED.format(module=module, code=code, now=now, most=most)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=100, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_large_is_made_for_a_file_that_does_not_hold_it(weights):
    # within the bounds, and 100 GB
    change(weights / "ar" / "config.json", width=1 << 16, codebook_size=1 << 20)
    code = f"""
try:
    models.TextToImage.from_pretrained({str(weights)!r})
except ValueError as error:
    print(error)
"""
    assert "has shape" in run_limited(code, "models")


def test_a_dtype_that_would_change_the_numbers_is_refused(tmp_path):
    model, file = transformer(), tmp_path / "x.safetensors"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for dtype, name in (
        (torch.float64, "F64"),
        (torch.int32, "I32"),
        (torch.int8, "I8"),
        (torch.float8_e5m2, "F8_E5M2"),
    ):
        write_atomically(state | {"start": state["start"].to(dtype)}, file, {})
        with pytest.raises(ValueError, match=rf"x\.safetensors: start is {name}, .* expects BF16"):
            load_weights(model, file)
    for dtype in (torch.float16, torch.bfloat16):
        write_atomically({k: v.to(dtype) for k, v in state.items()}, file, {})
        load_weights(model, file)
        assert model.start.dtype == torch.float32


def test_integers_are_taken_for_themselves_alone_and_named(tmp_path):
    file, expected = tmp_path / "x.safetensors", {"a": torch.zeros(2, dtype=torch.int16)}
    write_atomically({"a": torch.tensor([1, 2], dtype=torch.int16)}, file, {})
    assert load_tensors(file, expected, "x")["a"].tolist() == [1, 2]
    write_atomically({"a": torch.tensor([1, 2])}, file, {})
    with pytest.raises(ValueError, match="a is I64, x expects I16"):
        load_tensors(file, expected, "x")


def test_double_precision_is_read_into_doubles_and_not_saved_where_it_would_not_be_read(tmp_path):
    model, file = transformer().double(), tmp_path / "x.safetensors"
    state = {k: v.clone() for k, v in model.state_dict().items()}
    for dtype in (torch.float64, torch.float32, torch.float16):
        write_atomically({k: v.to(dtype) for k, v in state.items()}, file, {})
        load_weights(model, file)
        assert torch.equal(model.start, state["start"].to(dtype).double())
    with pytest.raises(ValueError, match=r"start is torch\.float64, expected one of .*float32"):
        model.save_pretrained(tmp_path / "model")
    assert not list((tmp_path / "model").iterdir())
    doubles = pipeline()
    doubles.network.double()
    doubles.save_pretrained(tmp_path / "halves", dtype=torch.float16)
    TextToImage.from_pretrained(tmp_path / "halves")


def test_a_tokenizer_with_weights_that_are_not_finite_is_refused(weights):
    file = weights / "tokenizer" / "model.safetensors"
    tensors, _ = read_tensors(file)
    tensors = {k: v.clone() for k, v in tensors.items()}
    tensors["latent_std"][0] = float("nan")
    write_atomically(tensors, file, {})
    with pytest.raises(ValueError, match="latent_std holds NaN"):
        TextToImage.from_pretrained(weights)


def test_a_null_condition_of_other_ids_or_another_shape_is_refused(weights):
    file = weights / "ar" / "null_condition.safetensors"
    for ids, match in (
        (torch.full((12,), 10**6), "holds the ids"),
        (torch.full((12,), -1), "holds the ids"),
        (torch.zeros(5, dtype=torch.long), r"has shape \(5,\)"),
        (torch.zeros(12), "is F32"),
    ):
        write_atomically({"null_condition": ids}, file, {})
        with pytest.raises(ValueError, match=match):
            TextToImage.from_pretrained(weights)


# Safetensors


class Trap:
    """Makes a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def header(values: object, data: bytes = b"") -> bytes:
    text = json.dumps(values).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "empty": b"",
    "seven bytes": b"1234567",
    "zeros": bytes(100),
    "header too long": struct.pack("<Q", 2**63) + b"{}",
    "header of 1 GB": struct.pack("<Q", 1 << 30) + b"{}",
    "header of 17 MB": struct.pack("<Q", 17 << 20) + b"{}" + b" " * ((17 << 20) - 2),
    "header beyond the end": struct.pack("<Q", 1000) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
    "nested": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "overlapping": header({"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12)),
    "a hole": header({"a": entry(0, 4, [1]), "b": entry(8, 12, [1])}, bytes(12)),
    "beyond the end": header({"a": entry(0, 400, [100])}, bytes(8)),
    "negative": header({"a": entry(-4, 0, [1])}, bytes(4)),
    "shape that overflows": header({"a": entry(0, 4, [2**62, 2**62])}, bytes(4)),
    "unknown dtype": header({"a": entry(0, 4, [1], "X99")}, bytes(4)),
    "more after the end": header({"a": entry(0, 4, [1])}, bytes(40)),
    "metadata that is no text": header({"__metadata__": {"a": 1}, "b": entry(0, 4, [1])}, bytes(4)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused_by_name(tmp_path, name):
    file = tmp_path / "model.safetensors"
    file.write_bytes(BROKEN[name])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        read_tensors(file)


def test_what_is_no_file_is_not_there(tmp_path):
    file = tmp_path / "model.safetensors"
    file.mkdir()
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (file, loop, tmp_path / "pipe.safetensors", tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="no weights at"):
            read_tensors(path)
        with pytest.raises(FileNotFoundError):
            read_json(path)


def test_a_pickle_is_refused_and_nothing_in_it_runs(weights, tmp_path):
    marker = tmp_path / "pwned"
    content = pickle.dumps(Trap(marker))
    for name in ("ar/model.safetensors", "ar/null_condition.safetensors", "ar/config.json"):
        before = (weights / name).read_bytes()
        (weights / name).write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(name)):
            TextToImage.from_pretrained(weights)
        (weights / name).write_bytes(before)
    torch.save({"a": torch.ones(2), "b": Trap(marker)}, weights / "ar/model.safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        TextToImage.from_pretrained(weights)
    assert not marker.exists()
    pickle.loads(content).close()
    assert marker.exists()  # the trap works


# What can run code, or build any object; each that is there with the reason
RUNS_CODE = re.compile(
    r"pickle|torch\.load\(|allow_pickle|joblib|yaml\.(unsafe_|full_)?load(_all)?\(|\beval\(|\bexec\("
)
HARMLESS = {
    "unicfg/training/checkpoint.py": ["Nothing is pickled."],
    # weights in an installed package come as a file of torch; weights_only builds tensors and nothing else
    "unicfg/evaluation/features.py": ["torch.load(path, map_location", "weights_only=True"],
    # the loader is a SafeLoader
    "unicfg/settings.py": ["yaml.load(content.decode", "_Loader)"],
}


def test_no_file_of_ours_unpickles_or_runs_what_it_reads():
    found = {}
    for package in ("unicfg", "tokenizers_vq", "models"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for line in file.read_text().splitlines():
                # model.eval() takes no argument
                if RUNS_CODE.search(line.replace(".eval()", "").replace("'eval()'", "")):
                    found.setdefault(file.relative_to(ROOT).as_posix(), []).append(line.strip())
    for name, lines in found.items():
        assert name in HARMLESS, (name, lines)
        assert len(lines) == 1 and all(part in lines[0] for part in HARMLESS[name]), lines
    import yaml

    from unicfg.settings import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


# Format versions


@pytest.mark.parametrize("version", [0, 2, "1", None, True, [1]])
def test_every_file_with_a_configuration_refuses_another_release(weights, tmp_path, version):
    loads = {
        weights / "pipeline.json": lambda: held_families(weights),
        weights / "ar/config.json": lambda: TokenTransformer.from_pretrained(weights / "ar"),
        weights / "tokenizer/config.json": lambda: VQTokenizer.from_pretrained(
            weights / "tokenizer"
        ),
        weights / "text.json": lambda: load_prompt_encoder(weights / "text.json"),
        tmp_path / "classes.json": lambda: load_prompt_encoder(tmp_path / "classes.json"),
        tmp_path / "study.json": lambda: read_settings(tmp_path / "study.json"),
    }
    ClassLabels(["cat"]).save(tmp_path / "classes.json")
    empty = {"families": [], "scales": [], "variants": {}, "study": {}}
    (tmp_path / "study.json").write_text(json.dumps(empty))
    for file, load in loads.items():
        before = file.read_text()
        load()  # as it was written
        change(file, format_version=1)
        load()
        change(file, format_version=version)
        with pytest.raises(
            ValueError, match=rf"{file.name}.*format_version is .*, expected 1"
        ) as said:
            load()
        assert "another release of unicfg" in str(said.value)
        values = json.loads(before)
        values.pop("format_version", None)
        file.write_text(json.dumps(values))
        load()  # of a release that wrote none


def test_files_that_state_no_version_are_of_the_first(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizers_vq.files, "FORMAT_VERSION", 2)
    ClassLabels(["cat"]).save(tmp_path / "classes.json")
    values = json.loads((tmp_path / "classes.json").read_text())
    del values["format_version"]
    (tmp_path / "classes.json").write_text(json.dumps(values))
    empty = {"families": [], "scales": [], "variants": {}, "study": {}}
    (tmp_path / "study.json").write_text(json.dumps(empty))
    for load in (
        lambda: load_prompt_encoder(tmp_path / "classes.json"),
        lambda: load_prompt_encoder(weights / "text.json"),
        lambda: read_settings(tmp_path / "study.json"),
    ):
        with pytest.raises(ValueError, match="format_version is 1, expected 2"):
            load()


# Pictures


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *, depth=8, colour=2, before=b"", rows=None) -> bytes:
    """A PNG by hand: ``before`` are chunks ahead of the pixels."""
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = zlib.compress(bytes(100) if rows is None else rows)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (chunk(b"IHDR", head), before, chunk(b"IDAT", data), chunk(b"IEND", b""))
    )


ROWS = (b"\0" + bytes([255, 0, 0]) * 8) * 8  # of a red picture, 8 x 8
BOMB = zlib.compress(bytes(50_000_000))


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    held = io.BytesIO()
    image.save(held, kind, **options)
    return held.getvalue()


def square(mode="RGB", colour="red", size=(8, 8)) -> Image.Image:
    return Image.new(mode, size, colour)


def adobe_cmyk() -> bytes:
    """A CMYK JPEG as Adobe's programs write it: inverted, with a segment that says so."""
    content = encoded(square("CMYK", (0, 255, 255, 0)), "JPEG")
    assert b"Adobe" in content
    return content


def animated(kind: str) -> bytes:
    return encoded(square(), kind, save_all=True, append_images=[square(colour="blue")] * 2)


def palette() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(image, "PNG", transparency=bytes([255, 0]))


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(square(), "PNG", exif=exif)


def icon(content: bytes) -> bytes:
    """An icon that says that its only picture has 16 x 16 pixels."""
    entry = struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(content), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + content


WHOLE = {
    "one pixel": (encoded(square(size=(1, 1)), "PNG"), RED),
    "wrong extension": (encoded(square(), "BMP"), RED),
    "16-bit grey": (encoded(Image.new("I;16", (8, 8), 100 * 257), "PNG"), [100] * 3),
    "32-bit grey": (encoded(Image.new("I", (8, 8), 100 * 257), "TIFF"), [100] * 3),
    "16-bit RGB": (png(8, 8, depth=16, rows=(b"\0" + b"\xff\xff\0\0\0\0" * 8) * 8), RED),
    "CMYK": (adobe_cmyk(), RED),
    "palette with transparency": (palette(), RED),
    "grey with alpha": (encoded(Image.new("LA", (8, 8), (0, 0)), "PNG"), WHITE),
    "GIF": (animated("GIF"), RED),
    "WebP": (animated("WEBP"), RED),
    "APNG": (animated("PNG"), RED),
    "unknown orientation": (turned(99), RED),
    "EXIF cut off": (encoded(square(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff"), RED),
    "pixels beyond the end": (png(8, 8, rows=ROWS + bytes(10**7)), RED),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", WHOLE)
def test_odd_pictures_are_read_right(tmp_path, name):
    content, expected = WHOLE[name]
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "a.txt").write_text("x")
    images = read(tmp_path)
    assert images.skipped == ()
    assert (images.images[0, :, 4, 4] - torch.tensor(expected)).abs().max() <= 2, name


SKIPPED = {
    "no bytes": (b"", "cannot identify"),
    "cut off": (encoded(square(), "PNG")[:50], "truncated"),
    "no width": (png(0, 5), "cannot identify"),
    "60000 x 60000": (png(60000, 60000), "DecompressionBomb"),
    "more than we take": (png(10_000, 9_000), f"expected at most {Image.MAX_IMAGE_PIXELS}"),
    "zTXt of 50 MB": (png(8, 8, before=chunk(b"zTXt", b"x\0\0" + BOMB), rows=ROWS), "too large"),
    "iCCP of 50 MB": (png(8, 8, before=chunk(b"iCCP", b"x\0\0" + BOMB), rows=ROWS), "too large"),
    "so many chunks": (png(8, 8, before=chunk(b"abCd", b"") * 150_000, rows=ROWS), "pieces"),
    "floats": (encoded(Image.new("F", (8, 8), 0.5), "TIFF"), "floating point"),
    "an icon of a bomb": (icon(encoded(Image.new("1", (9000, 10_000)), "PNG")), "expected at most"),
    "an icon of a larger one": (icon(png(60000, 60000)), "DecompressionBomb"),
    "PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot identify"),
    "17 MB of text": (b"P3 2000 3000 9 " + b"9 " * (17 << 19), "expected a binary one"),
    "a pickle": (pickle.dumps([1, 2]), "cannot identify"),
    "EXIF that is none": (encoded(square(), "PNG", exif=b"\xff" * 40), "TIFF"),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_pictures_that_cannot_be_used_are_counted_with_the_reason(tmp_path, name):
    content, reason = SKIPPED[name]
    save(tmp_path / "good.png")
    (tmp_path / "good.txt").write_text("x")
    (tmp_path / "bad.png").write_bytes(content)
    (tmp_path / "bad.txt").write_text("x")
    with pytest.warns(UserWarning, match="skipped 1 files"):
        images = read(tmp_path)
    assert len(images) == 1
    ((file, why),) = images.skipped
    assert file == "bad.png" and reason in why


def test_strips_and_files_that_are_none(tmp_path):
    save(tmp_path / "good.png", size=(1, 100_000))
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    for name in ("good", "folder", "pipe"):
        (tmp_path / f"{name}.txt").write_text("x")
    with pytest.warns(UserWarning, match="skipped 2 files"):
        images = read(tmp_path)
    assert dict(images.skipped).keys() == {"folder.png", "pipe.png"}
    assert all("no regular file" in why for _, why in images.skipped)


LARGEST = (9459, 9459)  # in all as many pixels as Pillow takes
EXIF = Image.Exif()
EXIF[0x0112] = 6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "colour", "kind", "options", "most", "expected"),
    [
        (
            "RGBA",
            (255, 0, 0, 100),
            "PNG",
            {"compress_level": 1, "exif": EXIF},
            1000,
            [255, 155, 155],
        ),
        ("RGB", (255, 0, 0), "JPEG", {"progressive": True, "exif": EXIF}, 1000, [254, 0, 0]),
        ("CMYK", (0, 255, 255, 0), "JPEG", {"exif": EXIF}, 1300, RED),
        ("I;16", 25700, "PNG", {"compress_level": 1}, 1000, [100, 100, 100]),
        ("RGB", (255, 0, 0), "TIFF", {}, 1000, RED),  # 268 MB, as large as its picture
        ("RGBA", (255, 0, 0, 100), "JPEG2000", {}, 2600, [255, 155, 155]),
    ],
    ids=lambda own: own if isinstance(own, str) else "",
)
def test_the_largest_pictures_take_bounded_memory(
    tmp_path, record_property, mode, colour, kind, options, most, expected
):
    with open(tmp_path / "a.png", "wb") as file:
        Image.new(mode, LARGEST, colour).save(file, kind, **options)
    size = (tmp_path / "a.png").stat().st_size
    code = f"""
import pathlib

def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])

before = peak()
pixels = unicfg.training.data.read_image(pathlib.Path({str(tmp_path / "a.png")!r}), 8)
print(pixels[4, 4].tolist())
print(peak() - before)
"""
    said, took = run_limited(code, "unicfg.training.data", most).splitlines()
    assert json.loads(said) == expected
    assert size < 1 << 28
    record_property(
        "measured", f"{LARGEST[0] ** 2 / 1e6:.0f} Mpx, {size / 1e6:.0f} MB: {int(took) >> 10} MB"
    )


# Paths


def test_links_that_lead_out_of_the_folder_are_not_followed(tmp_path):
    secret, folder = tmp_path / "secret", tmp_path / "data"
    save(secret / "a.png")
    (secret / "a.txt").write_text("secret")
    save(folder / "own.png")
    (folder / "own.txt").write_text("own")
    (folder / "kept.png").symlink_to(folder / "own.png")  # inside: as good as a file
    (folder / "kept.txt").write_text("kept")
    (folder / "out.png").symlink_to(secret / "a.png")
    (folder / "out.txt").write_text("x")
    save(folder / "text.png")
    (folder / "text.txt").symlink_to(secret / "a.txt")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "loop.txt").write_text("x")
    (folder / "sub").symlink_to(secret)
    with pytest.warns(UserWarning, match="skipped 3 files"):
        images = read(folder)
    assert images.captions == ["kept", "own"]
    reasons = dict(images.skipped)
    for name in ("out.png", "text.png"):
        assert reasons[name] == "a link that leads out of the folder"
    assert "loop.png" in reasons
    rows = [
        {"file_name": name, "text": name}
        for name in (
            "own.png",
            "own.png",
            "out.png",
            "sub/a.png",
            "a\nb.png",
            "x\0.png",
            "y" * 9000,
        )
    ]
    save(folder / "a\nb.png")
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.warns(UserWarning, match="skipped"):
        images = read(folder)
    assert images.captions == ["own.png", "own.png", "a\nb.png"]  # twice: two captions of one
    reasons = dict(images.skipped)
    assert reasons["sub/a.png"] == reasons["out.png"] == "a link that leads out of the folder"
    assert reasons["x\0.png"] == "a NUL in its name"
    assert "9000 characters" in reasons["y" * 100]


def test_metadata_that_is_a_link_out_of_the_folder_is_not_read(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/metadata.jsonl").write_text('{"file_name": "a.png", "text": "secret"}')
    folder = tmp_path / "data"
    save(folder / "a.png")
    (folder / "metadata.jsonl").symlink_to(tmp_path / "secret/metadata.jsonl")
    with pytest.raises(ValueError, match=r"metadata\.jsonl is not read: a link that leads out"):
        read(folder)
    (folder / "metadata.jsonl").unlink()
    (folder / "train").symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"no usable image, .*train \(a link that leads out"):
        read(folder)


@pytest.mark.parametrize(
    "name", ["/etc/a.png", "../a.png", "b/../../a.png", "C:\\a.png", "\\\\host\\share\\a.png"]
)
def test_names_outside_of_the_folder_are_refused(tmp_path, name):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(ValueError, match=r"line 1: file_name .* is outside of the folder"):
        read(tmp_path)


# Metadata


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"file_name": "a.png", "text": "' + b"x" * 2_000_000 + b'"}', "line of more than"),
        (b'{"a": ' * 100_000, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"file_name": "a.png", "text": "\\ud800"}', "half of a character"),
        (b'{"file_name": "\\udfff.png", "text": "x"}', "half of a character"),
        (b'{"file_name": "a.png", "text": "x", "y": NaN}', "found NaN"),
        (b'{"file_name": "a.png", "text": "x", "y": -Infinity}', "found -Infinity"),
        (b'{"file_name": "a.png", "text": "x", "y": ' + b"9" * 5000 + b"}", "is no JSON"),
        (b'{"file_name": "a.png", "text": "caf\xe9"}', "is no UTF-8"),
        (b'{"file_name": "a.png", "text": "x\0"}', "is no JSON"),
    ],
)
def test_hostile_lines_of_metadata_are_refused(tmp_path, line, match):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl.*{match}"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (b"a.png," + b"x" * 200_000, "field larger than field limit"),
        (b"a.png," + b"x" * 2_000_000, "line of more than"),
        (b"a.png,x,y,z", "expected 2 columns"),
        (b"a.png,caf\xe9", "is no UTF-8"),
    ],
)
def test_hostile_tables_are_refused(tmp_path, rows, match):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\n" + rows)
    with pytest.raises(ValueError, match=rf"metadata\.csv.*{match}"):
        read(tmp_path)


def test_a_nul_in_a_table(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,x\0y\na\0.png,z\n")
    with pytest.warns(UserWarning, match="skipped 1 files"):
        images = read(tmp_path)
    assert images.captions == ["x\0y"]


# YAML and JSON

LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(20)
)

MERGES = "a: &a {x: 1, y: 2}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} {{<<: [{', '.join([f'*{chr(97 + i)}'] * 9)}]}}\n"
    for i in range(20)
)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (LAUGHS, "more than 20000 values"),
        ("out: &a [*a]", "stands inside of itself"),
        ("out: a\ndata: &a {path: *a}", "stands inside of itself"),
        ("out: !!python/object/apply:os.mkdir [pwned]", "found the tag"),
        ("out: !!binary abc", "found the tag"),
        ('out: !!int ""', "'' does not suit the tag"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("out: a\nout: b", "found the key 'out' twice"),
        ("out: a\ndata: {count: 1, count: 2}", "found the key 'count' twice"),
        ("<<: {out: a}\n<<: {out: b}", "found the key '<<' twice"),
        ("<<: a", "is no YAML"),
        (MERGES, "more than 20000 values"),
        ("out: 0x" + "f" * 9000, "has 36000 bits"),
        ("out: 1" + "0" * 9000, "is no YAML"),
        ("out: 2020-99-99", "is no YAML"),
        ("out: 1" + ":59" * 500 + ".5", "is no YAML"),
        ('out: "\\ud800"', "is no YAML"),
        ("out: \0", "is no YAML"),
        ("x" * 200_000, "expected at most"),
        ("out: a\ndata: {image_size: true}", "image_size is True"),
        ("out: a\ndata: {image_size: 1000000}", "image_size is 1000000"),
        ("out: a\ndata: {wrong: .nan}", "wrong is nan"),
        ("out: a\nmodel: {dropout: 99999999999999999}", "dropout has 57 bits"),
        ("out: a\ntext: {length: 1000000000}", "length is 1000000000"),
        ("out: a\nmodel: {training: {batch_size: 1000000000000}}", "batch_size is 1000000000000"),
        ("out: a\nmodel: {training: {seed: -1}}", "seed is -1"),
    ],
)
def test_hostile_recipes_are_refused_by_name(tmp_path, monkeypatch, text, match):
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"x\.yaml.*{match}"):
        load_recipe("x.yaml")
    assert os.listdir() == ["x.yaml"]


def test_merges_and_tags_of_plain_values_are_read(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("""
out: !!str 12
tokenizer: {training: &base {steps: 7, learning_rate: !!float 1e-3}}
model: {training: {<<: *base, steps: !!int 9}}
families: {flow: {training: {<<: [*base]}}}
prompts: !!seq [! a]
""")
    recipe = load_recipe(file, "ar")
    assert recipe.out == "12" and recipe.prompts == ("a",)
    assert recipe.model.training.steps == 9 and recipe.model.training.learning_rate == 1e-3
    assert load_recipe(file, "flow").model.training.steps == 7


NESTED = '{"a": ' * 60 + "1" + "}" * 60


@pytest.mark.parametrize(
    "text", [NESTED, '{"a": ' * 100_000, "[" * 100_000, "9" * 5000, "[]", "\xff", " "]
)
def test_hostile_json_is_refused_by_name(tmp_path, text):
    file = tmp_path / "x.json"
    file.write_text(text, "latin-1")
    with pytest.raises(ValueError, match=r"x\.json"):
        read_json(file)


def test_json_that_is_too_large_is_not_parsed(tmp_path):
    file = tmp_path / "x.json"
    with file.open("wb") as handle:
        handle.truncate(1 << 40)  # a terabyte, of which nothing is on the disk
    with pytest.raises(ValueError, match=r"x\.json has 1099511627776 bytes, expected at most"):
        read_json(file)
    with pytest.raises(ValueError, match="expected at most"):
        read_prompts(file)


# Prompt encoders


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}}}, "model is no BPE"),
        ({"model": 3}, "model is no BPE"),
        ({"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}}, "dropout is 0.5"),
        (
            {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}},
            "regular",
        ),
        ({"pre_tokenizer": 3}, "is no tokenizer file"),
        ({"padding": None}, "no fixed length"),
        ({"added_tokens": []}, r"lacks|ids|is no tokenizer"),
        ({"version": "9.0"}, "is no tokenizer file"),
    ],
)
def test_a_hostile_vocabulary_is_refused(weights, changes, match):
    file = weights / "text.json"
    if "added_tokens" in changes:
        held = json.loads(file.read_text())["model"]
        held["vocab"] = {k: i for k, i in held["vocab"].items() if i > 2}
        changes = changes | {"model": held}
    change(file, **changes)
    with pytest.raises(ValueError, match=rf"text\.json.*({match})"):
        TextToImage.from_pretrained(weights)


def test_what_is_constructed_is_what_is_loaded_again(tmp_path):
    file = tmp_path / "text.json"
    bpe = TextTokenizer.train(["Regex Regex Regex"] * 9, vocabulary=300, length=4).bpe
    bpe.add_tokens(["Regex"])  # a word of the vocabulary is no pattern
    TextTokenizer(bpe, 4).save(file)
    again = TextTokenizer.load(file)
    assert again.bpe.token_to_id("Regex") == bpe.token_to_id("Regex")
    pattern = pre_tokenizers.Split(Regex("'s|[a-z]+"), "isolated")  # as CLIP has one
    for name, part in (
        ("pre_tokenizer", pre_tokenizers.Sequence([pattern, pre_tokenizers.ByteLevel()])),
        ("normalizer", normalizers.Replace(Regex("a+"), "")),
        ("decoder", decoders.Replace(Regex("a+"), "")),
    ):
        other = Tokenizer.from_str(bpe.to_str())
        setattr(other, name, part)
        with pytest.raises(ValueError, match=f"{name} holds the regular expression"):
            TextTokenizer(other, 4)
        values = json.loads(file.read_text()) | {name: json.loads(other.to_str())[name]}
        file.with_name("other.json").write_text(json.dumps(values))
        with pytest.raises(ValueError, match=f"{name} holds the regular expression"):
            TextTokenizer.load(file.with_name("other.json"))
    other = Tokenizer.from_str(bpe.to_str())
    other.model.dropout = 0.5
    with pytest.raises(ValueError, match=r"dropout is 0\.5"):
        TextTokenizer(other, 4)


def test_ids_beyond_the_vocabulary_lengths_and_truncation_are_refused(weights):
    file = weights / "text.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    far = held | {"model": held["model"] | {"vocab": vocabulary | {last: 10**9}}}
    long = held | {"padding": held["padding"] | {"strategy": {"Fixed": 10**9}}}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    for values, match in (
        (far, "expected the ids 0, 1, 2"),
        (long, "length is 1000000000"),
        (held | {"truncation": cut}, "truncation is"),
    ):
        file.write_text(json.dumps(values))
        with pytest.raises(ValueError, match=rf"text\.json.*{match}"):
            TextTokenizer.load(file)


# Studies


def test_damaged_results_are_refused_by_name(tmp_path):
    variants = {"plain": {"name": "plain", "scale": "s", "mitigations": "", "scales": []}}
    settings = {"families": ["ar"], "scales": [1.0], "variants": variants, "study": {}}
    cell = {
        "family": "ar",
        "variant": "plain",
        "s": 1.0,
        "measures": {},
        "missing": {},
        "trace": {},
    }
    cell |= {"failure": None, "made_with": "x", "source": "y"}
    file = tmp_path / "cells/ar/plain-s1/cell.json"
    file.parent.mkdir(parents=True)

    def load(cell: object = cell, settings: object = settings) -> Results:
        text = cell if isinstance(cell, str) else json.dumps(cell)
        file.write_text(text)
        (tmp_path / "study.json").write_text(json.dumps(settings))
        return Results.load(tmp_path)

    assert len(load().cells) == 1
    whole = json.dumps(cell)
    for broken, match in (
        (whole[: len(whole) // 2], "is no JSON"),
        ("", "is no JSON"),
        (cell | {"s": "1"}, "s is '1', expected a finite number"),
        (cell | {"s": 3.0}, "is of the cell ar s=3, expected ar s=1"),
        (cell | {"measures": [1]}, "measures is"),
        (cell | {"measures": {"kid": 3}}, "kid is 3"),
        (cell | {"measures": {"kid": {"value": "x", "error": 1, "n": 1}}}, "kid: value is 'x'"),
        (cell | {"failure": 3}, "failure is 3"),
    ):
        with pytest.raises(ValueError, match=rf"cell\.json.*{match}"):
            load(broken)
    many = {f"v{i}": variants["plain"] for i in range(1000)}
    for own, match in (
        ({"families": ["../../etc"]}, r"families holds '\.\./\.\./etc'"),
        ({"scales": [float("nan")]}, "one of scales is nan"),
        ({"scales": [True]}, "one of scales is True"),
        ({"variants": {"plain": 3}}, "the variant 'plain' is 3"),
        ({"variants": many, "scales": list(range(1000))}, "1000000 cells"),
    ):
        with pytest.raises(ValueError, match=rf"study\.json is not the settings .*{match}"):
            load(settings=settings | own)
    (tmp_path / "reference.json").write_text('{"measures": 3}')
    with pytest.raises(ValueError, match=r"reference\.json: measures is 3"):
        load()


def test_a_plan_of_too_many_cells_is_refused(tmp_path):
    file = tmp_path / "x.yaml"
    variants = ", ".join(f"{{name: v{i}}}" for i in range(200))
    file.write_text(f"scales: {list(range(200))}\nvariants: [{variants}]\n")
    with pytest.raises(ValueError, match=r"x\.yaml: there are 200 scales and 200 variants"):
        read_study(file)


# The script that builds the emoji set


def test_prepare_emoji_takes_no_links_and_no_bombs(tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("emoji", ROOT / "examples/prepare_emoji.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["emoji_script"] = sys.modules[spec.name] = script
    try:
        spec.loader.exec_module(script)
    finally:
        del sys.modules["emoji_script"]
    (tmp_path / "1f405.png").write_bytes(png(60000, 60000))
    with pytest.raises(OSError, match=r"1f405\.png cannot be read"):
        script.on_white(tmp_path / "1f405.png", 16)
    (tmp_path / "1f405.png").write_bytes(png(5000, 1, rows=bytes(15001)))
    with pytest.raises(OSError, match="expected 4096 a side"):
        script.on_white(tmp_path / "1f405.png", 16)
    (tmp_path / "1f405.png").unlink()
    (tmp_path / "1f405.png").symlink_to("/etc/hostname")
    concepts = {"1f405": script.Concept("tiger", (), "animals & nature")}
    with pytest.raises(ValueError, match="is a link, expected a picture"):
        script.find_pictures({tmp_path: script.PIP_SOURCE}, concepts, ["animals & nature"], False)
    # the packages are unpacked by npm and pip; the script itself unpacks nothing
    text = (ROOT / "examples/prepare_emoji.py").read_text()
    assert not re.search(r"tarfile|zipfile|unpack_archive|extractall", text)
    assert "--ignore-scripts" in text
