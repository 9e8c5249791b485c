"""Cloud Storage, over a folder: the JSON API, and reading as its XML API has it, which TensorFlow does.

An object is the file BUCKET/NAME in the folder, so that a container that has the folder at /gcs sees what gs:// shows, as with
Cloud Storage FUSE. Sources: the API's reference, https://cloud.google.com/storage/docs/json_api/v1.
"""

import base64
import contextlib
import email.parser
import email.policy
import hashlib
import itertools
import json
import os
import re
import stat
import threading
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

from vertex.http import Answer, RefusedError, Request, Route, as_json

_API = r"/storage/v1/b/(?P<bucket>[^/]+)"
_OBJECT = rf"{_API}/o/(?P<name>[^/]+)"


@dataclass
class _Object:
    """What is known of an object beside its bytes."""

    generation: int
    file: tuple[int, int]
    """Time and size of the file when this was written: another means that /gcs was written to."""
    updated: str
    content_type: str = "application/octet-stream"
    metadata: Mapping[str, str] = field(default_factory=dict)
    hashes: tuple[str, str] = ("", "")
    """MD5 and CRC32C; empty before anybody asked."""


@dataclass
class _Upload:
    """A resumable upload: what has come so far."""

    bucket: str
    about: Mapping[str, Any]
    query: Mapping[str, str]
    content: bytearray = field(default_factory=bytearray)


class Storage:
    """Buckets are the folders in `folder`. `read` counts the bytes of objects that were read, by BUCKET/NAME."""

    def __init__(self, folder: Path, page: int = 1000) -> None:
        self.folder = folder
        self.read: Counter[str] = Counter()
        self._page = page
        """Names in a page of a listing at most."""
        self._objects: dict[tuple[str, str], _Object] = {}
        self._markers: set[tuple[str, str]] = set()
        """Objects whose names end with a slash, as file systems on top make them for folders."""
        self._uploads: dict[str, _Upload] = {}
        self._generations = itertools.count(1_700_000_000_000_000)
        self._lock = threading.RLock()
        self._partial = folder.with_name(f"{folder.name}.partial")
        self._partial.mkdir(exist_ok=True)
        self.routes: list[Route] = [
            ("GET", _API, self._bucket),
            ("GET", f"{_API}/iam/testPermissions", self._permissions),
            ("GET", f"{_API}/o", self._list),
            ("GET", _OBJECT, self._get),
            ("GET", rf"/download{_OBJECT}", self._get),
            ("DELETE", _OBJECT, self._delete),
            ("PATCH", _OBJECT, self._patch),
            ("POST", rf"{_OBJECT}/(rewriteTo|copyTo)/b/(?P<to_bucket>[^/]+)/o/(?P<to_name>[^/]+)", self._copy),
            ("POST", rf"/(resumable/)?upload{_API}/o", self._upload),
            ("PUT", rf"/(resumable/)?upload{_API}/o", self._upload_more),
            ("DELETE", rf"/(resumable/)?upload{_API}/o", self._upload_ends),
            ("POST", r"/batch/storage/v1", self._batch),
        ]
        # Of storage.googleapis.com alone.
        self.xml_routes: list[Route] = [("GET", r"/(?P<bucket>[^/]+)/(?P<name>.+)", self._get_as_xml)]

    # ---- For tests

    def bucket(self, name: str) -> Path:
        """Returns the folder of a bucket, new if need be."""
        (self.folder / name).mkdir(parents=True, exist_ok=True)
        return self.folder / name

    # ---- Buckets

    def _bucket(self, request: Request, bucket: str) -> Answer:
        self._folder_of(bucket)
        return as_json({"kind": "storage#bucket", "name": bucket, "id": bucket, "location": "EUROPE-WEST4"})

    def _permissions(self, request: Request, bucket: str) -> Answer:
        self._folder_of(bucket)
        asked = re.findall(r"permissions=([^&]+)", request.query[""])
        return as_json({"kind": "storage#testIamPermissionsResponse", "permissions": [unquote(one) for one in asked]})

    def _folder_of(self, bucket: str) -> Path:
        folder = self.folder / unquote(bucket)
        if not folder.is_dir():
            raise RefusedError(404, f"The specified bucket does not exist: {bucket}")
        return folder

    def _list(self, request: Request, bucket: str) -> Answer:
        prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
        start, end = request.query.get("startOffset", ""), request.query.get("endOffset", "")
        with self._lock:
            folder = self._folder_of(bucket)
            found = {name for in_bucket, name in self._markers if in_bucket == bucket}
            near = folder / prefix.rpartition("/")[0]
            for at, _, files in os.walk(near):
                found |= {os.path.relpath(os.path.join(at, file), folder) for file in files}
            names, prefixes = set(), set()
            for name in found:
                if not name.startswith(prefix) or name < start or (end and name >= end):
                    continue
                inside = name[len(prefix) :].find(delimiter) if delimiter else -1
                if inside < 0 or (request.query.get("includeTrailingDelimiter") == "true" and name.endswith(delimiter)):
                    names.add(name)
                if inside >= 0:
                    prefixes.add(name[: len(prefix) + inside + len(delimiter)])
            token = request.query.get("pageToken", "")
            left = sorted(one for one in names | prefixes if one > token)
            page = left[: min(self._page, int(request.query.get("maxResults") or self._page))]
            answer: dict[str, Any] = {"kind": "storage#objects"}
            # Who writes to /gcs may have removed one meanwhile.
            if items := [self._about(bucket, name) for name in page if name in names and self._known(bucket, name)]:
                answer["items"] = items
            if folders := [name for name in page if name in prefixes and name not in names]:
                answer["prefixes"] = folders
            if len(left) > len(page):
                answer["nextPageToken"] = page[-1]
            return as_json(answer)

    # ---- Objects

    def _known(self, bucket: str, name: str) -> _Object | None:
        """Returns what is known of an object, or None where there is none; one that came through /gcs is made known."""
        if (bucket, name) in self._markers:
            return self._objects[bucket, name]
        if name.endswith("/"):
            return None
        try:
            status = (self._folder_of(bucket) / name).stat()
        except OSError:
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        known = self._objects.get((bucket, name))
        if known is None or known.file != (status.st_mtime_ns, status.st_size):
            known = _Object(next(self._generations), (status.st_mtime_ns, status.st_size), _now())
            self._objects[bucket, name] = known
        return known

    def _about(self, bucket: str, name: str) -> dict[str, Any]:
        known = self._known(bucket, name)
        if known is None:
            raise RefusedError(404, f"No such object: {bucket}/{name}")
        if not known.hashes[0]:
            content = self._content(bucket, name)
            crc = int(google_crc32c.value(content)).to_bytes(4, "big")
            md5 = hashlib.md5(content).digest()
            known.hashes = (base64.b64encode(md5).decode(), base64.b64encode(crc).decode())
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{known.generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(known.generation),
            "metageneration": "1",
            "contentType": known.content_type,
            "metadata": dict(known.metadata),
            "size": str(known.file[1]),
            "md5Hash": known.hashes[0],
            "crc32c": known.hashes[1],
            "etag": f"E{known.generation}",
            "storageClass": "STANDARD",
            "timeCreated": known.updated,
            "updated": known.updated,
        }

    def _content(self, bucket: str, name: str, first: int = 0, size: int = -1) -> bytes:
        if name.endswith("/"):
            return b""
        with (self._folder_of(bucket) / name).open("rb") as file:
            file.seek(first)
            return file.read(size)

    def _require(self, query: Mapping[str, str], bucket: str, name: str, suffix: str = "") -> None:
        """Raises RefusedError where the preconditions of a request do not hold."""
        known = self._known(bucket, name)
        generation = known.generation if known else 0
        wanted, unwanted = query.get(f"if{suffix}GenerationMatch"), query.get(f"if{suffix}GenerationNotMatch")
        if (wanted is not None and int(wanted) != generation) or (unwanted is not None and int(unwanted) == generation):
            raise RefusedError(412, f"At least one of the pre-conditions you specified did not hold: {bucket}/{name}")

    def _get(self, request: Request, bucket: str, name: str) -> Answer:
        bucket, name = unquote(bucket), unquote(name)
        with self._lock:
            about = self._about(bucket, name)
            self._require(request.query, bucket, name)
            if request.query.get("alt") != "media":
                return as_json(about)
            return self._media(request, about)

    def _get_as_xml(self, request: Request, bucket: str, name: str) -> Answer:
        with self._lock:
            return self._media(request, self._about(unquote(bucket), unquote(name)))

    def _media(self, request: Request, about: Mapping[str, Any]) -> Answer:
        first, size = 0, int(about["size"])
        headers = {
            "Content-Type": about["contentType"],
            "ETag": about["etag"],
            "X-Goog-Generation": about["generation"],
            "X-Goog-Metageneration": "1",
            "X-Goog-Hash": f"crc32c={about['crc32c']},md5={about['md5Hash']}",
        }
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", "")):
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            if first >= size:
                raise RefusedError(416, f"The requested range cannot be satisfied: {asked[0]} of {size}")
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            size = last + 1 - first
        content = self._content(about["bucket"], about["name"], first, size)
        self.read[f"{about['bucket']}/{about['name']}"] += len(content)
        return Answer(206 if asked else 200, content, headers)

    def _delete(self, request: Request, bucket: str, name: str) -> Answer:
        bucket, name = unquote(bucket), unquote(name)
        with self._lock:
            self._about(bucket, name)
            self._require(request.query, bucket, name)
            del self._objects[bucket, name]
            if (bucket, name) in self._markers:
                self._markers.remove((bucket, name))
            else:
                folder = self._folder_of(bucket)
                (folder / name).unlink()
                # A bucket has no folders: those that nothing is in any more are gone.
                for parent in (folder / name).parents:
                    if parent == folder or any(parent.iterdir()):
                        break
                    parent.rmdir()
            return Answer(204)

    def _patch(self, request: Request, bucket: str, name: str) -> Answer:
        bucket, name = unquote(bucket), unquote(name)
        with self._lock:
            self._about(bucket, name)
            about = json.loads(request.body or b"{}")
            if "metadata" in about:
                self._objects[bucket, name].metadata = about["metadata"]
            return as_json(self._about(bucket, name))

    def _copy(self, request: Request, bucket: str, name: str, to_bucket: str, to_name: str) -> Answer:
        bucket, name, to_bucket, to_name = map(unquote, (bucket, name, to_bucket, to_name))
        with self._lock:
            about = self._about(bucket, name)
            self._require(request.query, bucket, name, "Source")
            made = self._put(to_bucket, {**about, "name": to_name}, request.query, self._content(bucket, name))
            if "copyTo" in request.path:
                return as_json(made)
            size = made["size"]
            done = {"kind": "storage#rewriteResponse", "done": True, "totalBytesRewritten": size, "objectSize": size}
            return as_json({**done, "resource": made})

    def _put(self, bucket: str, about: Mapping[str, Any], query: Mapping[str, str], content: bytes) -> dict[str, Any]:
        """Makes an object, whole and at once; returns what is known of it."""
        name = about["name"]
        with self._lock:
            file = self._folder_of(bucket) / name
            self._require(query, bucket, name)
            stamp = (0, 0)
            if name.endswith("/"):
                self._markers.add((bucket, name))
            else:
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = self._partial / uuid.uuid4().hex
                partial.write_bytes(content)
                partial.replace(file)
                stamp = (file.stat().st_mtime_ns, len(content))
            kind = about.get("contentType") or "application/octet-stream"
            known = _Object(next(self._generations), stamp, _now(), kind, about.get("metadata") or {})
            self._objects[bucket, name] = known
            return self._about(bucket, name)

    # ---- Uploads

    def _upload(self, request: Request, bucket: str) -> Answer:
        with self._lock:
            return self._upload_of_kind(request, bucket, request.query.get("uploadType"))

    def _upload_of_kind(self, request: Request, bucket: str, kind: str | None) -> Answer:
        self._folder_of(bucket)
        if kind == "multipart":
            about, content = _parts(request)
            return as_json(self._put(bucket, {"name": request.query.get("name"), **json.loads(about)}, request.query, content))
        if kind == "media":
            about = {"name": request.query["name"], "contentType": request.headers.get("content-type")}
            return as_json(self._put(bucket, about, request.query, request.body))
        if kind != "resumable":
            raise RefusedError(400, f"uploadType {kind} is none")
        given = json.loads(request.body) if request.body else {}
        given.setdefault("name", request.query.get("name"))
        given.setdefault("contentType", request.headers.get("x-upload-content-type"))
        upload_id = uuid.uuid4().hex
        self._require(request.query, bucket, given["name"])
        self._uploads[upload_id] = _Upload(bucket, given, request.query)
        query = f"uploadType=resumable&name={quote(given['name'], safe='')}&upload_id={upload_id}"
        scheme = request.headers.get("x-scheme", "https")
        where = f"{scheme}://{request.host}/upload/storage/v1/b/{bucket}/o?{query}"
        return Answer(200, b"", {"Location": where, "X-GUploader-UploadID": upload_id})

    def _upload_more(self, request: Request, bucket: str) -> Answer:
        with self._lock:
            upload_id = request.query["upload_id"]
            upload = self._uploads.get(upload_id)
            if upload is None:
                raise RefusedError(404, f"there is no upload {upload_id}")
            sent = request.headers.get("content-range", f"bytes 0-{len(request.body) - 1}/{len(request.body)}")
            parsed = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", sent)
            if not parsed:
                raise RefusedError(400, f"Content-Range {sent} is none")
            first, total = parsed[1], parsed[3]
            if first is not None:
                if int(first) > len(upload.content):
                    raise RefusedError(503, f"bytes {len(upload.content)} to {first} are missing")
                upload.content[int(first) :] = request.body
            if total == "*" or len(upload.content) < int(total):
                there = {"Range": f"bytes=0-{len(upload.content) - 1}"} if upload.content else {}
                return Answer(308, b"", there)
            del self._uploads[upload_id]
            return as_json(self._put(upload.bucket, upload.about, upload.query, bytes(upload.content)))

    def _upload_ends(self, request: Request, bucket: str) -> Answer:
        self._uploads.pop(request.query["upload_id"], None)
        return Answer(499)

    def _batch(self, request: Request) -> Answer:
        """Answers several requests in one; each as if it had come alone."""
        text = b"Content-Type: " + request.headers["content-type"].encode() + b"\r\n\r\n" + request.body
        boundary, parts = f"batch_{uuid.uuid4().hex}", []
        for part in email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(text).iter_parts():
            head, _, rest = part.get_payload(decode=True).replace(b"\r\n", b"\n").partition(b"\n")
            method, target, *_ = head.decode().split()
            headers, _, body = rest.partition(b"\n\n")
            path = urlsplit(target)
            inner = Request(method, request.host, path.path, query_of(path.query), headers_of(headers.decode()), body)
            answer = self._answer(inner)
            lines = [f"HTTP/1.1 {answer.status} -", "Content-Type: application/json", f"Content-Length: {len(answer.body)}"]
            said = "\r\n".join([*lines, "", answer.body.decode()])
            parts.append(
                f"--{boundary}\r\nContent-Type: application/http\r\nContent-ID: response-{part['Content-ID']}\r\n\r\n{said}\r\n"
            )
        whole = "".join(parts) + f"--{boundary}--\r\n"
        return Answer(200, whole.encode(), {"Content-Type": f"multipart/mixed; boundary={boundary}"})

    def _answer(self, request: Request) -> Answer:
        with contextlib.suppress(StopIteration):
            handle, match = next(
                (handle, match)
                for method, pattern, handle in self.routes
                if method == request.method and (match := re.fullmatch(pattern, request.path))
            )
            try:
                return handle(request, **match.groupdict())
            except RefusedError as error:
                return as_json({"error": {"code": error.status, "message": str(error)}}, error.status)
        raise RefusedError(404, f"no such method in a batch: {request.method} {request.path}")


def query_of(text: str) -> dict[str, str]:
    """Returns a query by name, and whole under the empty name."""
    return {"": text, **dict(parse_qsl(text, keep_blank_values=True))}


def headers_of(text: str) -> dict[str, str]:
    pairs = (line.split(":", 1) for line in text.split("\n") if ":" in line)
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _parts(request: Request) -> tuple[bytes, bytes]:
    """Returns what a multipart upload says of the object, and the object's bytes."""
    found = re.search(r'boundary="?([^";]+)', request.headers["content-type"])
    if not found:
        raise RefusedError(400, "a multipart upload has a boundary")
    _, about, content, _ = re.split(rb"\r?\n?--" + re.escape(found[1].encode()) + rb"(?:--)?", request.body, maxsplit=3)
    return tuple(re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (about, content))  # type: ignore[return-value]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
