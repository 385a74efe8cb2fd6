"""Closes the ways that gradio offers to files: the page keeps its pictures in its own text and needs none of them."""

from __future__ import annotations

import re

from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

# uploads, the server's files, recordings, saved sessions, and fetching from other servers (also file=http://...)
CLOSED = re.compile(
    r"(/gradio_api)?/+(file[=/]|proxy=|upload|stream/|process_recording|deep_link|runs|run-history|vibe)"
)


class NoFiles:
    """ASGI middleware that answers 404 where files would be read, written or fetched.

    Args:
        app: what answers everything else.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        answer = self.app
        if scope["type"] == "http" and CLOSED.match(scope["path"]):
            answer = PlainTextResponse("There are no files here.\n", status_code=404)
        await answer(scope, receive, send)
