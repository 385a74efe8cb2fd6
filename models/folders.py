"""Where pipelines lie: with the library, in a folder, on the Hugging Face hub; and which families each holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from tokenizers_vq.files import (
    FORMAT_VERSION,
    UNSTATED_VERSION,
    check_format_version,
    read_json,
    read_tensors,
    write_text_atomically,
)
from tokenizers_vq.hub import CONFIG, WEIGHTS

DESCRIPTION = "pipeline.json"


def describe(folder: Path, families: Sequence[str]) -> None:
    """Say which families a folder holds; the last thing that is written to it.

    Raises:
        OSError: if it cannot be written.
    """
    description = {"format_version": FORMAT_VERSION, "families": list(families)}
    write_text_atomically(json.dumps(description, indent=2) + "\n", folder / DESCRIPTION)


def families_beside(folder: Path, repo_id: str, token: str | None) -> list[str]:
    """The families that a repository holds, which share the tokenizer in ``folder``; none where there is none yet.

    Raises:
        ValueError: if they have another.
    """

    def fetch(file: str) -> Path:
        return Path(hf_hub_download(repo_id, file, token=token))

    try:
        families = listed_families(fetch(DESCRIPTION).parent)
    except (GatedRepoError, LocalEntryNotFoundError):
        raise  # nothing is known of it
    except (RepositoryNotFoundError, EntryNotFoundError):
        return []
    for file in ("text.json", f"tokenizer/{CONFIG}", f"tokenizer/{WEIGHTS}"):
        if not _same(fetch(file), folder / file):
            raise ValueError(
                f"{repo_id} holds {', '.join(families)} with another {file}, expected families of one tokenizer (saved "
                "in one dtype): take another repository"
            )
    return families


def held_families(name: Path | str) -> list[str]:
    """The families that a pipeline's folder holds.

    Raises:
        FileNotFoundError: if there is no such pipeline; says where it was looked for.
        ValueError: if its description was written by another release, or is damaged.
    """
    return listed_families(find_weights(name, ()))


def listed_families(folder: Path) -> list[str]:
    """The families that a pipeline's folder lists.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it was written by another release, or is damaged.
    """
    file = folder / DESCRIPTION
    description = read_json(file)
    try:
        check_format_version(description)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    families = description.get("families")
    if not isinstance(families, list) or not all(isinstance(own, str) for own in families):
        raise ValueError(f"{file}: families is {families!r:.200}, expected a list of names")
    return families


def _same(one: Path, other: Path) -> bool:
    """Whether two files hold the same; another release may have written it in other bytes."""
    if one.name == WEIGHTS:
        tensors, others = read_tensors(one)[0], read_tensors(other)[0]
        return tensors.keys() == others.keys() and all(
            own.dtype == others[name].dtype and torch.equal(own, others[name])
            for name, own in tensors.items()
        )
    held = [{"format_version": UNSTATED_VERSION} | read_json(file) for file in (one, other)]
    return held[0] == held[1]


def shipped_weights() -> dict[str, Path]:
    """Names and folders of the weights that ship with the library."""
    root = Path(str(resources.files("models"))) / "weights"
    return {p.parent.name: p.parent for p in sorted(root.glob(f"*/{DESCRIPTION}"))}


def find_tokenizer(name: Path | str) -> Path:
    """The folder of an image tokenizer: of a shipped or a local pipeline, one by itself, or one on the hub, in that order.

    Raises:
        FileNotFoundError: if it is none of these.
    """
    folder = shipped_weights().get(str(name), Path(name))
    for found in (folder / "tokenizer", folder):
        if (found / WEIGHTS).is_file():
            return found
    known = f"expected one of {sorted(shipped_weights())}, the folder of a pipeline or tokenizer, or a hub repository"
    if folder.exists() or str(name).count("/") != 1:
        raise FileNotFoundError(f"no tokenizer at {str(name)!r}: {known}")
    try:
        return Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS]))
    except Exception as error:  # the hub client has no common base class for "not to be had"
        raise FileNotFoundError(f"no tokenizer at {str(name)!r} ({error}): {known}") from error


def find_weights(
    name: Path | str,
    families: Sequence[str] = ("*",),
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Path:
    """The folder of a pipeline: shipped, local, or downloaded from the hub, in that order.

    Args:
        name: of the weights, a folder, or a repository.
        families: that are wanted: of a repository nothing else is downloaded. () is the list of families alone.
        revision: branch, tag or commit of a repository.
        token: of the hub; None takes the one that is logged in.

    Raises:
        FileNotFoundError: if it is none of these.
    """
    shipped = shipped_weights()
    if str(name) in shipped:
        return shipped[str(name)]
    if (Path(name) / DESCRIPTION).is_file():
        return Path(name)
    known = f"expected one of {sorted(shipped)}, a folder with pipeline.json, or a hub repository"
    if Path(name).exists() or str(name).count("/") != 1:
        raise FileNotFoundError(f"no pipeline at {str(name)!r}: {known}")
    parts = ("tokenizer", *families) if families else ()
    files = [DESCRIPTION, "text.json"]
    files += [f"{part}/{file}" for part in parts for file in (CONFIG, "*.safetensors")]
    try:
        return Path(
            snapshot_download(str(name), revision=revision, token=token, allow_patterns=files)
        )
    except Exception as error:  # the hub client has no common base class for "not to be had"
        raise FileNotFoundError(f"no pipeline at {str(name)!r} ({error}): {known}") from error
