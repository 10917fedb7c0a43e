"""A small real HTTP server that tests tell what to answer."""

import json
import threading
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, str], Any]]
Page = tuple[int, Any]


class Broken(bytes):
    """As far as the answer comes before the connection breaks."""


class Server:
    """Answers each POST through ``answer(body, how many times this body came)``, each GET from ``pages``, and remembers
    the bodies and headers. Status 0 drops the connection; bytes go out as they are, anything else as JSON."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.pages: dict[str, Page | Callable[[], Page]] = {}
        self.answer: Answer = lambda body, times: (200, {}, {"id": "x", "usage": {"completion_tokens": 2}})
        lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.bodies.append(body)
                    outer.headers.append(self.headers)
                    times = outer.bodies.count(body)
                self._send(*outer.answer(body, times))

            def do_GET(self) -> None:
                page = outer.pages.get(self.path, (404, {"error": {"message": "no such page"}}))
                status, content = page() if callable(page) else page
                self._send(status, {}, content)

            def _send(self, status: int, headers: dict[str, str], content: Any) -> None:
                if status == 0:
                    self.close_connection = True
                    return
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                broken = isinstance(content, Broken)
                for name, value in {**headers, "content-length": str(len(data) + broken)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
                self.close_connection = self.close_connection or broken

            def log_message(self, format: str, *args: Any) -> None: ...

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
