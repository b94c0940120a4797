"""Stores on loopback: Google's emulated by gcp-storage-emulator, Amazon's by moto."""

import contextlib
import functools
import http.server
import io
import re
import sys
import threading
import urllib.parse

import pytest
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage

BUCKET = "a-bucket"


class Emulator(RequestHandler):
    """The emulator, with the conditions on generations that clients set, and able to refuse everything."""

    refusal = 0  # the status of every answer, if not 0
    refused = 0  # answers with it

    def parse_request(self):
        if not super().parse_request():
            return False
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.rfile = io.BytesIO(body)
        url = urllib.parse.urlparse(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        self.generation = self._generation(url.path, query, body)
        status = self.refusal or self._unmet(query)
        type(self).refused += bool(self.refusal)
        if self.command == "DELETE" and url.path.startswith("/upload"):
            status = 499  # an upload that was called off
        if status:
            self.send_error(status)
        return not status

    def _generation(self, path, query, body):
        """That of the object that is asked for or written; "0" where there is none."""
        there, in_body = re.fullmatch(r".*/o/(.+)", path), re.search(rb'"name": ?"([^"]+)"', body)
        name = (
            query.get("name")
            or (there and urllib.parse.unquote(there[1]))
            or (in_body and in_body[1].decode())
        )
        try:
            return str(self.storage.get_file_obj(BUCKET, name)["generation"])
        except NotFound:
            return "0"

    def _unmet(self, query):
        """The status that says which condition is not met, or 0."""
        if query.get("ifGenerationMatch", self.generation) != self.generation:
            return 412
        return 304 if self.generation != "0" and query.get("ifGenerationNotMatch") == self.generation else 0

    def end_headers(self):
        if self.command == "GET" and "alt=media" in self.path:
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    def log_message(self, *_):
        pass


class Server(http.server.HTTPServer):
    def handle_error(self, request, client_address):
        """Clients hang up, killed ones in the middle of a word; anything else is printed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def google():
    """The handler of an emulator that has a bucket; the clients of this process and its children know it."""
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)
    with Server(("127.0.0.1", 0), functools.partial(Emulator, storage)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("STORAGE_EMULATOR_HOST", url)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", url)
            patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks Google for the bucket's kind
            yield Emulator
        server.shutdown()


@contextlib.contextmanager
def amazon():
    """The URL of a bucket in moto's S3; the clients of this process and its children know it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*server.get_host_and_port()))
        patch.setenv("AWS_ACCESS_KEY_ID", "anybody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        boto3.client("s3").create_bucket(Bucket=BUCKET)
        yield f"s3://{BUCKET}"
    server.stop()
