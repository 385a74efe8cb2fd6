"""The gate before gradio: what the page itself asks for comes in, and nothing else.

Gradio also offers uploads, the server's files, fetching from other servers, recordings and more. The page needs none of it,
and what a later gradio adds is closed from the start.
"""

from __future__ import annotations

import ipaddress
import json
import re
import threading
import time
from collections import defaultdict
from collections.abc import Collection, Mapping
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LONGEST_BODY = 65536  # bytes; all that the page sends is far below
PATIENCE = 10.0  # seconds in which a message should have left for its visitor
ASKED = re.compile(
    r"/|/config|/theme\.css|/favicon\.ico|/(assets|static)/[\w./@-]+"
    r"|/gradio_api/(startup-events|queue/data|heartbeat/\w{1,64})"
)
POSTED = frozenset({"/gradio_api/queue/join", "/gradio_api/run/predict"})
HEARD = "/gradio_api/queue/data"
LOCAL = frozenset({"localhost", "127.0.0.1", "::1"})
HOST_NAME = re.compile(r"[\w-]+(\.[\w-]+)*", re.ASCII)


class Audience:
    """Who listens to drawings. Safe to use from several threads."""

    def __init__(self) -> None:
        # session -> its streams -> when the message that is on its way was sent; infinity where none is
        self._streams: defaultdict[str, dict[object, float]] = defaultdict(dict)
        self._changed = threading.Condition()

    def note(self, session: str, stream: object, sent: float | None) -> None:
        """Say how a stream goes.

        Args:
            session: of the visitor.
            stream: any object that stands for the connection.
            sent: since when a message is on its way to the visitor, in seconds of ``time.monotonic()``; infinity if none
                is, None once the connection has ended.
        """
        with self._changed:
            if sent is None:
                self._streams[session].pop(stream, None)
                if not self._streams[session]:
                    del self._streams[session]
            else:
                self._streams[session][stream] = sent
            self._changed.notify_all()

    def listens(self, session: str | None) -> bool:
        """Whether somebody does: connected, and taking what is sent within ``PATIENCE`` seconds."""
        with self._changed:
            return self._listens(session)

    def await_listener(self, session: str | None, seconds: float) -> bool:
        """Whether somebody listens, or begins to within some seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._listens(session), seconds)

    def _listens(self, session: str | None) -> bool:
        now = time.monotonic()
        if session is None or session not in self._streams:
            return False
        return any(now - sent < PATIENCE for sent in self._streams[session].values())


class Gate:
    """ASGI middleware that answers what the page does not ask for: 404, 403 for other sites, 413 and 400 for odd bodies.

    Args:
        app: what answers everything else.
        inputs: numbers of inputs of the page's functions, by their index.
        audience: is told who listens.
        names: hosts that the page answers as: another site's name that was made to lead here is refused, and so is
            what another site's page posts. None is any name, and what a page posts must come from the same.
    """

    def __init__(
        self,
        app: ASGIApp,
        inputs: Mapping[int, int],
        audience: Audience,
        names: Collection[str] | None,
    ) -> None:
        self.app, self.inputs, self.audience, self.names = app, inputs, audience, names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._answer(scope, receive, send)
        else:
            await send({"type": "websocket.close"})  # before it is accepted: 403

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, method = scope["path"], scope["method"]
        refused: tuple[int, str] | None = None
        if not _is_from(Headers(scope=scope), self.names):
            refused = (403, "The page is not served as this host: unicfg demo --name HOST adds it.")
        elif method == "POST" and path in POSTED:
            body = await _read(receive)
            refused = self._refusal(body)
            receive = _again(body or b"", receive)
        elif method not in ("GET", "HEAD") or not ASKED.fullmatch(path) or ".." in path:
            refused = (404, "There is nothing here.")
        if refused is not None:
            status, text = refused
            await PlainTextResponse(f"{text}\n", status)(scope, receive, send)
        elif path == HEARD:
            await self._let_listen(scope, receive, send)
        else:
            await self.app({**scope, "query_string": b""}, receive, send)

    def _refusal(self, body: bytes | None) -> tuple[int, str] | None:
        """Status and sentence where gradio could not tell what is wrong with a body, or would hold too much of it."""
        if body is None:
            return 413, f"The request has more than {LONGEST_BODY} bytes."
        try:
            asked = json.loads(body)
            inputs, count = self.inputs.get(asked["fn_index"]), len(asked["data"])
        except (ValueError, TypeError, KeyError, RecursionError):
            return 400, "The request is not one of the page's."
        if count != inputs:
            return 400, f"The page has no function {asked['fn_index']!r:.20} of {count} values."
        return None

    async def _let_listen(self, scope: Scope, receive: Receive, send: Send) -> None:
        session = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [""])[0]
        stream = object()

        async def timed(message: Message) -> None:
            self.audience.note(session, stream, time.monotonic())
            await send(message)
            self.audience.note(session, stream, float("inf"))

        try:
            self.audience.note(session, stream, float("inf"))
            await self.app(scope, receive, timed)
        except RuntimeError as error:
            if not isinstance(error.__cause__, HTTPException):
                raise
            # the session has nothing to hear: gradio says so in an event, and leaves the answer open
            await send({"type": "http.response.body", "body": b""})
        finally:
            self.audience.note(session, stream, None)


def page_names(host: str, others: Collection[str]) -> Collection[str] | None:
    """The names that a page answers as.

    Args:
        host: that it is served at.
        others: names by which it is also reached.

    Returns:
        them all; None, any, where other machines can reach the host and no others are given.

    Raises:
        ValueError: if one of the others is more or less than the name of a host.
    """
    for name in others:
        if not HOST_NAME.fullmatch(name):
            raise ValueError(f"name is {name!r}, expected that of a host, such as demo.example.org")
    try:
        is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = False
    return {*LOCAL, *map(str.lower, (host, *others))} if is_local or others else None


def _is_from(headers: Headers, names: Collection[str] | None) -> bool:
    """Whether a request names one of these hosts, and comes from a page of theirs if it comes from a page."""
    origin = headers.get("origin")
    try:
        host = urlsplit(f"//{headers.get('host', '')}").hostname
        page = None if origin is None else urlsplit(origin).hostname
    except ValueError:
        return False
    if names is None:
        return origin is None or (page is not None and page == host)
    return host in names and (origin is None or page in names)


async def _read(receive: Receive) -> bytes | None:
    """A request's body, None if it is too long or its sender has left."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        body += message.get("body", b"")
        if len(body) > LONGEST_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read once more, and then whatever comes."""
    given = False

    async def once_more() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once_more
