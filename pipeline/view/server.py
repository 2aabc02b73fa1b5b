"""HTTP server of the page: for this machine alone, and for no page but its own."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
import socketserver
import sys
import threading
import webbrowser
from collections.abc import Callable, Mapping
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from types import TracebackType
from typing import Any, ClassVar
from urllib.parse import parse_qs

from ezsd.data.stream import is_finite
from ezsd.errors import EzsdError
from ezsd.pipeline.console.options import as_options
from ezsd.pipeline.errors import ArgumentError, is_of_a_place, with_cure
from ezsd.pipeline.files import parse_object
from ezsd.pipeline.inference.visualize import BASE_COLOUR, NOVEL_COLOUR
from ezsd.pipeline.report.page import template
from ezsd.pipeline.view.boxes import ALL_KINDS
from ezsd.pipeline.view.pictures import Picture, encoded, thumbnail
from ezsd.pipeline.view.target import Part, Target, ViewRequest, require_position
from ezsd.pipeline.view.trial import Detectors, GivenImages

log = logging.getLogger("ezsd")

HOST = "127.0.0.1"
MAX_UPLOAD = 64 * 2**20
"""Most bytes of an image that is given to the page."""
MAX_TEXT = 2**18
"""Most bytes of any other request."""
_PATIENCE = 0.4
"""Seconds after which a page that waits for the images with an error is told how far the judging is, and asks again."""
_OWN_HOSTS = frozenset({"127.0.0.1", "localhost", "[::1]"})
"""Names by which a browser on this machine calls it, also through a forwarded port. A page of a stranger whose name is
made to lead here has another."""
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_STATIC = {
    "/": ("view.html", "text/html; charset=utf-8"),
    "/view.js": ("view.js", "text/javascript; charset=utf-8"),
    "/view.svg": ("view.svg", "image/svg+xml"),
}


class _Refusal(Exception):
    """Answer to a request that is not served."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status


class Viewer:
    """Server of a page about a run or a store; a context, which frees the port.

    Args:
        request: what to show.
        port: port on this machine; 0 for any free one.

    Raises:
        EzsdError: neither a run nor a store can be shown, or the port cannot be used.
    """

    def __init__(self, request: ViewRequest, port: int = 0) -> None:
        self.target = Target(request)
        self.detectors, self.given = Detectors(self.target), GivenImages()
        self.session = secrets.token_hex(4)
        """Part of images' addresses: no image of another page is taken from the browser's memory."""
        # Read now, so that what is wrong is said before a page is open.
        self.target.part(self.target.part_names[0])
        self.thumbnails = lru_cache(maxsize=4096)(self._thumbnail)
        self._decoding = threading.BoundedSemaphore(2)
        handler = type("Handler", (_Handler,), {"viewer": self})
        try:
            self._server = _Server((HOST, port), handler)
        except OSError as error:
            raise _port_error(port, error) from error

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.server_close()

    @property
    def address(self) -> str:
        """URL of the page."""
        return f"http://{HOST}:{self._server.server_address[1]}/"

    def open_browser(self) -> None:
        """Open the page in the user's browser, where there is a screen."""
        # Without one a browser for terminals might start, over what is printed here.
        if sys.platform != "linux" or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
            webbrowser.open(self.address)

    def serve(self) -> None:
        """Answer requests until `close` is called, or the process is interrupted."""
        self._server.serve_forever()

    def close(self) -> None:
        """End `serve`, which runs in another thread."""
        self._server.shutdown()

    def index(self) -> dict[str, Any]:
        """Everything about the page but its images."""
        target = self.target
        return {
            "name": target.name,
            "dataset": target.dataset.name,
            "session": self.session,
            "parts": list(target.part_names),
            "runs": [run.label for run in target.runs],
            "base": list(target.split.base),
            "novel": list(target.split.novel),
            "evaluated": target.request.evaluate,
            "notes": target.notes,
            "max_upload": MAX_UPLOAD,
        }

    def picture(self, part: Part, position: int) -> Picture:
        """An image of a part."""
        with self._decoding:
            return encoded(part.source.read(part.images[position]).permute(1, 2, 0).numpy())

    def given_picture(self, key: str) -> Picture:
        """An image that was given to the page."""
        with self._decoding:
            return encoded(self.given.get(key).pixels())

    def _thumbnail(self, part: str, position: int) -> Picture:
        found = self.target.part(part)
        with self._decoding:
            return thumbnail(found.source.read(found.images[position]).permute(1, 2, 0).numpy())


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Bind without asking the network for this machine's name, as the library's own server would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - as in the library
        """Leave out that a browser has hung up; all other errors of the server are shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    """Answers of one connection."""

    viewer: ClassVar[Viewer]
    protocol_version = "HTTP/1.1"
    server_version = "ezsd"
    sys_version = ""
    timeout = 60

    def do_GET(self) -> None:
        """Answer a request for a page, an image or data."""
        self._answer(self._get)

    def do_POST(self) -> None:
        """Answer a request that gives an image or asks for detections."""
        self._answer(self._post)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log requests where somebody debugs, and not on the terminal."""
        log.debug("view: " + format, *arguments)

    def _answer(self, route: Callable[[str, Mapping[str, str]], None]) -> None:
        self._unread = self.command == "POST"
        try:
            self._require_own()
            path, _, query = self.path.partition("?")
            route(path, {name: values[-1] for name, values in parse_qs(query).items()})
        except _Refusal as refusal:
            self._refuse(refusal.status, str(refusal))
        except EzsdError as error:
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, as_options(str(error)))
        except ConnectionError:
            self.close_connection = True
        except OSError as error:
            if not is_of_a_place(error):
                raise
            self._refuse(HTTPStatus.UNPROCESSABLE_ENTITY, with_cure(error))
        except Exception:
            log.exception("view: %s %s", self.command, self.path)
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, "a bug of ezsd: the terminal shows it")

    def _require_own(self) -> None:
        """Refuse what another page than ours asks for."""
        host = self.headers.get("Host", "")
        if re.sub(r":\d*$", "", host).lower() not in _OWN_HOSTS:
            raise _Refusal(HTTPStatus.FORBIDDEN, f"open this page as http://{HOST}, not as {host!r}")
        origin, site = self.headers.get("Origin"), self.headers.get("Sec-Fetch-Site", "none")
        # A link on another page may open this one, and no more.
        opened = self.path.partition("?")[0] == "/" and self.headers.get("Sec-Fetch-Mode") == "navigate"
        foreign = origin is not None and origin.lower().partition("://")[2] != host.lower()
        if foreign or (site not in ("same-origin", "none") and not opened):
            raise _Refusal(HTTPStatus.FORBIDDEN, "asked by another page")

    def _get(self, path: str, query: Mapping[str, str]) -> None:
        viewer = self.viewer
        if path in _STATIC:
            name, kind = _STATIC[path]
            self._send(files("ezsd.pipeline.view").joinpath(name).read_bytes(), kind)
        elif path == "/view.css":
            style = template("ezsd.pipeline.view", "view.css.j2")
            text = style.render(base_colour=BASE_COLOUR, novel_colour=NOVEL_COLOUR)
            self._send(text.encode(), "text/css; charset=utf-8")
        elif path == "/api/index":
            self._send_json(viewer.index())
        elif path == "/api/part":
            self._send_json(viewer.target.part(query.get("part", "")).index())
        elif path == "/api/boxes":
            part, position = self._part_of(query)
            self._send_json(part.boxes(position))
        elif path == "/api/masks":
            part, position = self._part_of(query)
            self._send_json(part.masks(position))
        elif path == "/api/find":
            self._find(query)
        elif path == "/image":
            self._send_picture(viewer.picture(*self._part_of(query)))
        elif path == "/thumbnail":
            _, position = self._part_of(query)
            self._send_picture(viewer.thumbnails(query["part"], position))
        elif path == "/given":
            self._send_picture(viewer.given_picture(query.get("key", "")))
        else:
            raise _Refusal(HTTPStatus.NOT_FOUND, f"{path}: nothing here")

    def _post(self, path: str, query: Mapping[str, str]) -> None:
        if path == "/api/given":
            # The name is shown in messages and nowhere opened.
            name = query.get("name", "")[-200:] or "the image"
            key, image = self.viewer.given.add(name, self._body(MAX_UPLOAD))
            self._send_json({"key": key, "name": name, "width": image.width, "height": image.height})
        elif path == "/api/detect":
            self._detect(parse_object(self._body(MAX_TEXT), "the request"))
        elif path == "/api/competitors":
            self._competitors(parse_object(self._body(MAX_TEXT), "the request"))
        else:
            raise _Refusal(HTTPStatus.NOT_FOUND, f"{path}: nothing here")

    def _detect(self, asked: Mapping[str, Any]) -> None:
        names = asked.get("names", "")
        if not isinstance(names, str):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "names: expected a text")
        pixels = self._pixels(asked)
        self._send_json(self.viewer.detectors.detect(pixels, names, alone=asked.get("alone") is True))

    def _competitors(self, asked: Mapping[str, Any]) -> None:
        box, name, run = asked.get("box"), asked.get("name"), asked.get("run")
        # Beyond the bound a float32 of the detector may overflow.
        numbers = isinstance(box, list) and len(box) == 4 and all(is_finite(one) and abs(one) < 1e9 for one in box)
        runs = len(self.viewer.target.runs)
        if not (numbers and isinstance(name, str) and type(run) is int and 0 <= run < runs):
            raise _Refusal(HTTPStatus.BAD_REQUEST, "expected a box, a name and the number of a run")
        assert isinstance(box, list)
        assert type(run) is int
        self._send_json(self.viewer.detectors.competitors(run, self._pixels(asked), [float(one) for one in box], name))

    def _pixels(self, asked: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an array
        """Pixels (H, W, 3) of the image that a request is about: given to the page, or of a part."""
        if "key" in asked:
            return self.viewer.given.get(str(asked["key"])).pixels()
        part, position = self._part_of({name: str(asked.get(name, "")) for name in ("part", "image")})
        return part.source.read(part.images[position]).permute(1, 2, 0).numpy()

    def _part_of(self, query: Mapping[str, str]) -> tuple[Part, int]:
        """Part and position of the image that a request names."""
        part, position = self.viewer.target.part(query.get("part", "")), _whole(query, "image")
        require_position(part, position)
        return part, position

    def _find(self, query: Mapping[str, str]) -> None:
        kind = next((one for one in ALL_KINDS if one == query.get("kind")), None)
        if query.get("kind") and kind is None:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"kind: expected one of {', '.join(ALL_KINDS)}")
        try:
            threshold = float(query.get("threshold", "0"))
        except ValueError:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "threshold: expected a number") from None
        part, run = self.viewer.target.part(query.get("part", "")), _whole(query, "run") if query.get("run") else 0
        class_index = _whole(query, "class") if query.get("class") else None
        if kind is not None and (judging := part.judging(run)).errors(_PATIENCE) is None:
            done, every = judging.progress
            self._send_json({"judged": done, "of": every})
        else:
            self._send_json({"images": part.find(class_index, kind, run=run, threshold=threshold)})

    def _body(self, most: int) -> bytes:
        length = self.headers.get("Content-Length")
        if length is None or not re.fullmatch(r"\d{1,15}", length, re.ASCII):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "expected a Content-Length")
        if int(length) > most:
            raise _Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"has {int(length):,} bytes, at most {most:,} are read")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the request has ended early")
        self._unread = False
        return body

    def _send_json(self, value: object) -> None:
        self._send(json.dumps(value).encode(), "application/json")

    def _send_picture(self, picture: Picture) -> None:
        # Its address has the session in it.
        self._send(picture.data, picture.kind, cache="private, max-age=86400, immutable")

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        if self._unread:
            # What is left of the request would be read as the next one.
            self.close_connection = True
        self._send(json.dumps({"error": text}).encode(), "application/json", status=status)

    def _send(self, data: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK, cache: str = "no-store") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": cache, **_HEADERS}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _whole(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "")
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII):
        raise _Refusal(HTTPStatus.BAD_REQUEST, f"{name}: expected a whole number")
    return int(text)


def _port_error(port: int, error: OSError) -> ArgumentError:
    why = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be used ({error.strerror})"
    return ArgumentError(f"`port={port}`: {why}; give another `port`, or `port=0` for any free one")
