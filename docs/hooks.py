"""What the pages need to be a site: they link to files of the repository, which a site does not have."""

import re

OUTSIDE = re.compile(
    r"\[([^\]]+)\]\(((?:\.\./)+(?:unicfg|models|benchmarks|examples|tests|README)[^)]*)\)"
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Links out of the documentation become the path in the repository."""
    return OUTSIDE.sub(lambda own: f"{own[1]} (`{own[2].replace('../', '')}`)", markdown)
