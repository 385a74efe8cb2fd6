"""Pre-encoding: codes are what the tokenizer makes of each image, and never those of another."""

import dataclasses

import pytest
import torch
from test_sources import Counting

from models import ClassLabels, TextTokenizer
from tokenizers_vq import VQTokenizer, VQTokenizerConfig, to_float
from unicfg.training import encode, sources
from unicfg.training.encode import encode_images, hash_of, shifted
from unicfg.training.shapes import make_shapes
from unicfg.training.shards import Shards
from unicfg.training.sources import prepare_images

SCENES = make_shapes(11, size=16, wrong=0.0)


def make_tokenizer(seed=0):
    torch.manual_seed(seed)
    config = VQTokenizerConfig(image_size=16, factor=4, width=16, depth=1, levels=(5, 5, 5))
    return VQTokenizer(config).eval()


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROUND", 4)
    prepare_images(Counting(), tmp_path / "images", 0.0, workers=1)
    return tmp_path / "images"


TEXT = TextTokenizer.train(SCENES.captions, 280, 10)


def test_codes_are_those_of_each_image_and_caption(images, tmp_path):
    tokenizer = make_tokenizer()
    codes = encode_images(tokenizer, TEXT, images, "train", tmp_path / "codes")
    ids, latents, text = codes.first(100)
    pixels = to_float(SCENES.images)
    with torch.no_grad():
        assert torch.equal(ids.long(), tokenizer.encode(pixels).flatten(1))
        torch.testing.assert_close(latents, tokenizer.encode_latents(pixels))
    assert torch.equal(text.long(), TEXT.encode(SCENES.captions))


def test_crops_are_the_image_itself_and_then_shifted_ones(images, tmp_path):
    tokenizer = make_tokenizer()
    options = {"crops": 3, "shift": 1}
    codes = encode_images(tokenizer, TEXT, images, "train", tmp_path / "codes", **options)
    ids = codes.first(100)[0].view(3, 11, -1)
    plain = encode_images(tokenizer, TEXT, images, "train", tmp_path / "plain").first(100)[0]
    assert len(codes) == 33 and torch.equal(ids[0], plain)
    assert not torch.equal(ids[1], plain) and not torch.equal(ids[1], ids[2])
    again = encode_images(tokenizer, TEXT, images, "train", tmp_path / "again", **options)
    assert torch.equal(again.first(100)[0], codes.first(100)[0])
    other = encode_images(tokenizer, TEXT, images, "train", tmp_path / "other", seed=1, **options)
    assert not torch.equal(other.first(100)[0], codes.first(100)[0])


def test_a_shard_without_rows_is_encoded(tmp_path, monkeypatch):
    """As of data that names its splits: a round of training images has none for validation."""
    monkeypatch.setattr(sources, "ROUND", 4)

    class Split(Counting):
        def entries(self):
            for own in super().entries():
                yield dataclasses.replace(own, split="train" if own.content < 8 else "val")

    prepare_images(Split(), tmp_path / "images", 0.5, workers=1)
    for part, rows in (("train", 8), ("validation", 3)):
        codes = encode_images(make_tokenizer(), TEXT, tmp_path / "images", part, tmp_path / part)
        assert len(codes) == rows and codes.count == 3
        assert codes.first(1)[1].shape == (1, 3, 4, 4)


def test_an_interrupted_encoding_goes_on_and_ends_the_same(images, tmp_path, monkeypatch):
    tokenizer = make_tokenizer()
    options = {"crops": 2, "shift": 1}
    whole = encode_images(tokenizer, TEXT, images, "train", tmp_path / "whole", **options)
    encoded = []
    write = encode.write_shard

    def counted(folder, number, *rest):
        if len(encoded) == 4:
            raise KeyboardInterrupt
        encoded.append(number)
        write(folder, number, *rest)

    monkeypatch.setattr(encode, "write_shard", counted)
    with pytest.raises(KeyboardInterrupt):
        encode_images(tokenizer, TEXT, images, "train", tmp_path / "cut", **options)
    with pytest.raises(FileNotFoundError):
        Shards(tmp_path / "cut", ("ids",))
    monkeypatch.setattr(encode, "write_shard", lambda *a: (encoded.append(a[1]), write(*a)))
    again = encode_images(tokenizer, TEXT, images, "train", tmp_path / "cut", **options)
    assert encoded == [0, 1, 2, 3, 4, 5]  # none twice
    for a, b in zip(whole.first(100), again.first(100), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("finished", [True, False])
def test_stale_codes_are_refused(images, tmp_path, finished):
    """Of another tokenizer, even by one weight; of other captions; of other crops."""
    tokenizer, folder = make_tokenizer(), tmp_path / "codes"
    encode_images(tokenizer, TEXT, images, "train", folder)
    if not finished:
        (folder / "shards.json").unlink()
    changed = make_tokenizer()
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert hash_of(changed) != hash_of(tokenizer) == hash_of(make_tokenizer())
    for tokenizer_now, text, options in (
        (changed, TEXT, {}),
        (tokenizer, TextTokenizer.train(SCENES.captions, 281, 10), {}),
        (tokenizer, ClassLabels(sorted(set(SCENES.captions))), {}),
        (tokenizer, TEXT, {"crops": 2, "shift": 1}),
    ):
        with pytest.raises(ValueError, match="made from other data or by another tokenizer"):
            encode_images(tokenizer_now, text, images, "train", folder, **options)
    assert len(encode_images(tokenizer, TEXT, images, "train", folder)) == 11


def test_a_seed_is_heeded_only_where_it_shifts_something(images, tmp_path):
    tokenizer, plain, crops = make_tokenizer(), tmp_path / "plain", tmp_path / "crops"
    first = encode_images(tokenizer, TEXT, images, "train", plain, seed=1)
    assert encode_images(tokenizer, TEXT, images, "train", plain).made_from == first.made_from
    encode_images(tokenizer, TEXT, images, "train", crops, crops=2, shift=1)
    for finished in (True, False):
        if not finished:
            (crops / "shards.json").unlink()
        with pytest.raises(ValueError, match=r"or not with crops 2, shift 1 and seed 7 .*: remove"):
            encode_images(tokenizer, TEXT, images, "train", crops, crops=2, shift=1, seed=7)
        with pytest.raises(ValueError, match=r"or not with crops 1 .*: remove the folder .*crops"):
            encode_images(tokenizer, TEXT, images, "train", crops)


def test_shifted_images_are_the_image_moved():
    image = torch.arange(36.0).view(1, 1, 6, 6).expand(40, 3, 6, 6)
    moved = shifted(image, 1, torch.Generator().manual_seed(0))
    assert moved.shape == image.shape
    inner = {tuple(m[0, 2, 2:4].tolist()) for m in moved}
    assert inner == {(v, v + 1) for v in (7.0, 8.0, 9.0, 13.0, 14.0, 15.0, 19.0, 20.0, 21.0)}
    assert all(set(m.flatten().tolist()) <= set(range(36)) for m in moved)  # nothing is made up
    assert shifted(image, 0, torch.Generator()) is image
