"""Folders of images for tests."""

from PIL import Image

from unicfg.training.data import read_folder


def save(file, mode="RGB", size=(8, 8), colour="red", **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(file, **options)


def read(folder, size=8):
    return read_folder(folder, size, progress=False)
