"""What a repository of weights tells its readers: a card in the format of the Hugging Face hub, and a picture."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, ModelCardData
from PIL import Image

CARD, PICTURE = "README.md", "samples.png"


@dataclass(frozen=True)
class Facts:
    """What only the people who trained a model can say about it; Markdown, where nothing else is said.

    Attributes:
        data: what it was trained on, with sources and attribution.
        licence: identifier on the hub, as in "apache-2.0" or "cc-by-4.0".
        recipe: how it was trained, as YAML.
        numbers: what was measured, with the commands.
        limits: what it cannot do.
        picture: samples, or reconstructions.
        caption: of the picture.

    Raises:
        ValueError: if data or licence are empty.
    """

    data: str
    licence: str
    recipe: str = ""
    numbers: str = ""
    limits: str = ""
    picture: Image.Image | None = None
    caption: str = ""

    def __post_init__(self) -> None:
        """Check that the two are there that nobody can look up."""
        for name in ("data", "licence"):
            if not getattr(self, name).strip():
                raise ValueError(
                    f"{name} is empty, expected what the readers of the card must know"
                )


def write_card(
    folder: Path,
    title: str,
    about: str,
    code: str,
    facts: Facts | None,
    tags: Sequence[str] = (),
    pipeline_tag: str | None = None,
) -> None:
    """Write ``README.md`` and the picture beside the weights.

    Args:
        folder: that holds the weights.
        title: name of the repository or folder.
        about: a sentence.
        code: Python that loads the weights.
        facts: None writes a card that says that it lacks them.
        tags: of the hub.
        pipeline_tag: the task, in the hub's words.
    """
    parts = [f"# {title}", about, f"```python\n{code}\n```"]
    if facts is None:
        parts.append("Data, licence and numbers: nothing was said when these weights were saved.")
    else:
        if facts.picture is not None:
            facts.picture.save(folder / PICTURE)
            parts.append(f"![{facts.caption or 'Samples'}]({PICTURE})")
            parts += [facts.caption] if facts.caption else []
        texts = {"Data": facts.data, "Numbers": facts.numbers, "Limits": facts.limits}
        parts += [f"## {name}\n\n{text.strip()}" for name, text in texts.items() if text.strip()]
        if facts.recipe.strip():
            parts.append(f"## Recipe\n\n```yaml\n{facts.recipe.strip()}\n```")
    head = ModelCardData(
        license=None if facts is None else facts.licence,
        library_name="unicfg",
        tags=list(dict.fromkeys(["unicfg", *tags])),
        pipeline_tag=pipeline_tag,
    )
    text = f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def upload(
    repo_id: str,
    write: Callable[[Path], None],
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str,
) -> str:
    """Write a folder and send it to a repository of the hub, which is made if need be.

    Args:
        repo_id: as in "someone/shapes".
        write: fills a folder that is empty.
        private: of a new repository.
        token: of the hub; None takes the one that is logged in.
        commit_message: of the commit.

    Returns:
        the address of the commit.

    Raises:
        ValueError: if the repository has no owner in its name.
    """
    if repo_id.count("/") != 1:
        raise ValueError(
            f"repo_id is {repo_id!r}, expected an owner and a name, as in 'someone/shapes'"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        # before the repository is made: what cannot be written leaves none behind
        write(folder)
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, commit_message=commit_message
        )
    return str(commit.commit_url)
