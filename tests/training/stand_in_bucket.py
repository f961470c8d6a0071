"""A stand-in for Google Cloud Storage on this machine: the part of its JSON API that the three clients here use.

`gs://` paths pass through gcsfs (etils: small files, listings), TensorStore (arrays) and google-cloud-storage (Orbax
asks for the bucket's kind); all of them are the real ones and speak HTTP with this server. Objects appear whole, writes
can demand a generation, there are no folders and no appending, as in the real thing. Credentials, gRPC, buckets with a
hierarchical namespace, retries after failures and speed are not imitated.
"""

import base64
import email
import email.message
import hashlib
import itertools
import json
import re
import threading
import urllib.parse
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import google_crc32c


class Bucket:
    """The objects of one bucket: name -> (bytes, generation)."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()

    def put(self, name: str, data: bytes, match: str | None = None) -> dict | None:
        """Write an object; None where its generation is not the required one (0: absent)."""
        with self.lock:
            if match is not None and int(match) != self.objects.get(name, (b"", 0))[1]:
                return None
            self.objects[name] = data, next(self.generations)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        data, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "id": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
            "etag": str(generation),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.Checksum(data).digest()).decode(),
        }

    def listing(self, prefix: str, delimiter: str, start: str, end: str) -> dict:
        items, prefixes = [], set()
        for name in sorted(self.objects):
            if not name.startswith(prefix) or name < start or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    """Requests of the JSON API."""

    protocol_version = "HTTP/1.1"
    bucket: Bucket
    uploads: dict[str, dict]

    def log_message(self, *_):
        pass

    def answer(self, status: int, body=b"", headers=()):
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), (*headers, ("Content-Type", "application/json"))
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fault(self, status: int, reason: str):
        self.answer(
            status, {"error": {"code": status, "message": reason, "errors": [{"reason": reason, "message": reason}]}}
        )

    def handle_request(self):
        url = urllib.parse.urlsplit(self.path)
        query = {name: values[0] for name, values in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        length = int(self.headers.get("Content-Length") or 0)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self.read_chunk, b""))
        else:
            body = self.rfile.read(length)
        path = re.sub("^/(upload|download)?/?storage/v1/", "/", url.path)
        if match := re.fullmatch("/b/([^/]+)", path):
            return self.answer(200, {"kind": "storage#bucket", "name": match[1], "id": match[1], "location": "US"})
        if match := re.fullmatch("/b/[^/]+/o/?", path):
            return self.listing(query) if self.command == "GET" else self.upload(query, body)
        if match := re.fullmatch("/b/[^/]+/o/([^/]+)/(rewriteTo/b/[^/]+|moveTo)/o/([^/]+)", path):
            source, target = urllib.parse.unquote(match[1]), urllib.parse.unquote(match[3])
            if source not in self.bucket.objects:
                return self.fault(404, "notFound")
            made = self.bucket.put(target, self.bucket.objects[source][0])
            if match[2] == "moveTo":
                self.bucket.objects.pop(source)
                return self.answer(200, made)
            return self.answer(200, {"done": True, "resource": made})
        if match := re.fullmatch("/b/[^/]+/o/(.+)", path):
            return self.one(urllib.parse.unquote(match[1]), query)
        return self.fault(501, f"the stand-in does not know {self.command} {self.path}")

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_request

    def read_chunk(self) -> bytes:
        size = int(self.rfile.readline().split(b";")[0], 16)
        data = self.rfile.read(size)
        self.rfile.readline()
        return data

    def listing(self, query: dict):
        names = ("prefix", "delimiter", "startOffset", "endOffset")
        with self.bucket.lock:
            self.answer(200, self.bucket.listing(*(query.get(name, "") for name in names)))

    def upload(self, query: dict, body: bytes):
        kind, name, match = query.get("uploadType"), query.get("name"), query.get("ifGenerationMatch")
        if kind == "multipart":
            message = email.message_from_bytes(
                b"Content-Type: " + self.headers["Content-Type"].encode() + b"\r\n\r\n" + body
            )
            description, _ = message.get_payload()
            name = name or json.loads(description.get_payload())["name"]
            # The bytes between the second part's blank line and the closing boundary, untouched by the mail parser.
            boundary = (
                b"\r\n--" + message.get_boundary().encode()
                if b"\r\n--" in body
                else b"\n--" + message.get_boundary().encode()
            )
            part = body.split(boundary)[1]
            data = re.split(b"\r?\n\r?\n", part, maxsplit=1)[1]
        elif kind == "resumable":
            if "upload_id" not in query:
                name = name or json.loads(body)["name"]
                identity = str(len(self.uploads))
                self.uploads[identity] = {"name": name, "match": match, "data": b""}
                host = f"http://{self.headers['Host']}{self.path}"
                return self.answer(200, b"", [("Location", f"{host}&upload_id={identity}")])
            state = self.uploads[query["upload_id"]]
            state["data"] += body
            if self.headers.get("Content-Range", "").endswith("/*"):
                return self.answer(308, b"", [("Range", f"bytes=0-{len(state['data']) - 1}")])
            name, match, data = state["name"], state["match"], state["data"]
        else:
            data = body
        made = self.bucket.put(name, data, match)
        return self.answer(200, made) if made else self.fault(412, "conditionNotMet")

    def one(self, name: str, query: dict):
        with self.bucket.lock:
            data, generation = self.bucket.objects.get(name, (b"", 0))
            described = self.bucket.describe(name) if generation else None
        if self.command == "DELETE":
            if not generation:
                return self.fault(404, "notFound")
            if query.get("ifGenerationMatch") not in (None, str(generation)):
                return self.fault(412, "conditionNotMet")
            with self.bucket.lock:
                self.bucket.objects.pop(name, None)
            return self.answer(204)
        if "ifGenerationMatch" in query and query["ifGenerationMatch"] != str(generation):
            return self.fault(412, "conditionNotMet")
        if not generation:
            return self.fault(404, "notFound")
        if query.get("ifGenerationNotMatch") == str(generation):
            return self.answer(304)
        if query.get("alt") != "media":
            return self.answer(200, described)
        headers = [
            ("x-goog-generation", str(generation)),
            ("ETag", str(generation)),
            ("Content-Type", "application/octet-stream"),
            ("x-goog-hash", f"crc32c={described['crc32c']}"),
        ]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                return self.fault(416, "requestedRangeNotSatisfiable")
            headers.append(("Content-Range", f"bytes {first}-{last}/{len(data)}"))
            return self.answer(206, data[first : last + 1], headers)
        return self.answer(200, data, headers)


@contextmanager
def serve():
    """Yield (environment variables that point all clients here, the Bucket); it serves any bucket's name."""
    bucket = Bucket()
    handler = type("Handler", (Handler,), {"bucket": bucket, "uploads": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # ignore clients that hang up
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "EPATH_USE_TF": "false",
        "TENSORSTORE_GCE_METADATA_ROOT": "127.0.0.1:1",
        "GCE_METADATA_ROOT": "127.0.0.1:1",
        "NO_GCE_CHECK": "true",
    }
    try:
        yield variables, bucket
    finally:
        server.shutdown()
        server.server_close()
