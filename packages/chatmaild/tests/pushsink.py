# SPDX-License-Identifier: MIT
"""A notification server over real sockets that does what a test says, and remembers."""

import contextlib
import http.server
import select
import threading
import time


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # of more at once than that the kernel keeps some waiting for seconds


class Sink:
    """Listens on 127.0.0.1; `answers` maps a token to a status, or to what else is done with it:

    "hang" (no answer until the sink ends), "close" (no answer, connection closed), "garbage", "flood"
    (an answer without end), a number below 100 (answers 200 after so many seconds), or a list of
    these, one a request.
    """

    def __init__(self, context=None):
        self.answers = {}
        self.default = 200
        self.tokens = []  # of all requests, in order of arrival
        self.paths = set()
        self.connections = 0
        self.busy = self.most_busy = 0
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http{'s' if context else ''}://127.0.0.1:{self.port}/notify"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    def wait_for(self, count, seconds=20):
        """The tokens of the first *count* requests; raises AssertionError if they do not come."""
        self.wait_until(lambda: len(self.tokens) >= count, seconds)
        return self.tokens[:count]

    def wait_until(self, condition, seconds=20):
        """Return when *condition*, asked after each request, is true."""
        with self._changed:
            came = self._changed.wait_for(condition, seconds)
        assert came, f"{len(self.tokens)} requests: {[token[:20] for token in self.tokens]}"

    def close(self):
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _next(self, token):
        with self._changed:
            self.tokens.append(token)
            self.busy += 1
            self.most_busy = max(self.busy, self.most_busy)
            answer = self.answers.get(token, self.default)
            if isinstance(answer, list):
                answer = answer.pop(0)
            self._changed.notify_all()
        return answer

    def _end(self):
        with self._changed:
            self.busy -= 1
            self._changed.notify_all()

    def _handler(sink):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                sink.connections += 1

            def handle(self):
                with contextlib.suppress(OSError):
                    super().handle()

            def do_POST(self):
                sink.paths.add(self.path)
                length = int(self.headers["Content-Length"])
                body = self.rfile.read(length)
                if len(body) < length:  # the client died
                    self.close_connection = True
                    return
                answer = sink._next(body.decode())
                try:
                    self._answer(answer)
                finally:
                    sink._end()

            def _answer(self, answer):
                if answer == "hang":
                    while not sink._over.is_set():
                        if select.select([self.connection], [], [], 0.05)[0]:
                            break  # the client has left
                    self.close_connection = True
                elif answer == "close":
                    self.close_connection = True
                elif answer == "garbage":
                    self.wfile.write(b"220 smtp.example ESMTP\r\n")
                    self.close_connection = True
                elif answer == "flood":
                    self.send_response(200)
                    self.end_headers()
                    self.close_connection = True
                    while not sink._over.is_set():
                        self.wfile.write(bytes(65536))
                else:
                    if answer < 100:
                        time.sleep(answer)
                        answer = 200
                    self.send_response(answer)
                    self.send_header("Content-Length", "2")
                    if answer in (301, 307):
                        self.send_header("Location", "/elsewhere")
                    self.end_headers()
                    self.wfile.write(b"ok")

            def log_message(self, *_words):
                pass

        return Handler
