"""An S3 server in memory that answers as servers other than AWS do: one oddity at a time."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import parse_qs, quote, unquote, urlsplit

PAGE = 3
"""Keys of one page of a listing."""
LOGIN = b"<!DOCTYPE html><html><body>Please log in</body></html>"


class OddS3(ThreadingHTTPServer):
    """One bucket `b`; what is odd about it is in `odd`, which tests may change."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.objects: dict[str, tuple[bytes, datetime, dict[str, str]]] = {}
        self.odd: set[str] = set()
        self.lock = Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def odd_s3() -> Iterator[OddS3]:
    with OddS3() as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: OddS3

    def log_message(self, *_: object) -> None:
        """Nothing: no lines among those of the tests."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, f"<Error><Code>{code}</Code><Message>no {code}</Message></Error>".encode())

    @property
    def key(self) -> str:
        return unquote(urlsplit(self.path).path).removeprefix("/b").removeprefix("/")

    def page(self) -> bool:
        """Whether a proxy's page was answered in the place of everything."""
        odd = "page" in self.server.odd  # once: a test changes it as soon as it has the answer
        if odd:
            self.answer(200, LOGIN, Content_Type="text/html; charset=utf-8")
        return odd

    def do_PUT(self) -> None:
        body, conditional = self.rfile.read(int(self.headers["Content-Length"])), "If-None-Match" in self.headers
        if self.page():
            return None
        if conditional and "unconditional" in self.server.odd:
            return self.refuse(501, "NotImplemented")
        with self.server.lock:
            if conditional and "replaces" not in self.server.odd and self.key in self.server.objects:
                return self.refuse(412, "PreconditionFailed")
            meta = {
                name.title(): value for name, value in self.headers.items() if name.lower().startswith("x-amz-meta")
            }
            self.server.objects[self.key] = body, datetime.now(UTC), meta
        if "lost-answer" in self.server.odd:
            self.server.odd.remove("lost-answer")
            return self.refuse(503, "SlowDown")
        self.answer(200)
        return None

    def do_HEAD(self) -> None:
        self.object(b"")

    def do_GET(self) -> None:
        if self.page():
            return
        if not self.key:
            self.listing({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})
        else:
            self.object(None)

    def object(self, content: bytes | None) -> None:
        if self.key not in self.server.objects:
            return self.refuse(404, "NoSuchKey")
        body, modified, meta = self.server.objects[self.key]
        headers = {"ETag": f'"{hashlib.md5(body, usedforsecurity=False).hexdigest()}"'}
        headers["Last-Modified"] = format_datetime(modified, usegmt=True)
        headers |= {"Content-Length": str(len(body)), **meta}
        for name, odd in [("ETag", "no-etag"), ("Last-Modified", "no-time-at-all")]:
            if odd in self.server.odd:
                del headers[name]
        if "no-metadata" in self.server.odd:
            headers = {name: value for name, value in headers.items() if name not in meta}
        status, begin = 200, 0
        if "Range" in self.headers and "no-range" not in self.server.odd:
            begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
            status, headers["Content-Length"] = 206, str(len(body) - begin)
        sent = body[begin:]
        if "half" in self.server.odd and content is None:
            self.server.odd.remove("half")
            sent, self.close_connection = sent[: len(sent) // 2], True
        self.answer(status, sent, **headers)
        return None

    def listing(self, asked: dict[str, str]) -> None:
        odd = self.server.odd
        after = max(asked.get("continuation-token", ""), "" if "version-1" in odd else asked.get("start-after", ""))
        prefix = "" if "any-prefix" in odd else asked.get("prefix", "")
        keys = [key for key in sorted(self.server.objects) if key.startswith(prefix) and key > after]
        shown = keys if "no-truncated" in odd else keys[:PAGE]
        rows = "".join(self.row(key) for key in shown)
        if "no-truncated" not in odd:
            rows += f"<IsTruncated>{str(len(keys) > PAGE).lower()}</IsTruncated>"
        if len(keys) > PAGE and not odd & {"version-1", "no-token", "no-truncated"}:
            rows += f"<NextContinuationToken>{shown[-1]}</NextContinuationToken>"
        if "encoded" in odd:
            rows += "<EncodingType>url</EncodingType>"
        self.answer(200, f"<ListBucketResult>{rows}</ListBucketResult>".encode(), Content_Type="application/xml")

    def row(self, key: str) -> str:
        body, modified, _ = self.server.objects[key]
        told = f"<Key>{quote(key) if 'encoded' in self.server.odd else key}</Key>"
        if "no-size" not in self.server.odd:
            told += f"<Size>{len(body)}</Size>"
        if "no-time" not in self.server.odd and "no-time-at-all" not in self.server.odd:
            told += f"<LastModified>{modified.isoformat()}</LastModified>"
        return f"<Contents>{told}</Contents>"

    def do_DELETE(self) -> None:
        if self.page():
            return
        gone = self.server.objects.pop(self.key, None)
        if gone is None and "no-such-delete" in self.server.odd:
            self.refuse(404, "NoSuchKey")
        else:
            self.answer(204)
