"""A server on this machine that stands for the internet: an HTTP proxy with TLS.

    with DataServer({"https://host/file": b"content"}) as server:
        subprocess.run([...], env={**os.environ, **server.environment()})

Programs that follow the usual environment variables, such as those that use `requests`, send each
request to it, whatever the host; nothing leaves the machine. A certificate of the hosts is made for
the run with the command `openssl`, and `server.environment()` has it trusted.
"""

import collections
import pathlib
import ssl
import subprocess
import tempfile
import threading
from collections.abc import Collection, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


def tls_context(folder, hosts):
    """(a server's TLS context for these hosts, the certificate, which vouches for itself)."""
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    # A request without an extension section: openssl would add the system's.
    (folder / "empty.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
    names = ",".join(f"DNS:{host}" for host in sorted(hosts))
    more = ["-subj", "/CN=Server of the tests", "-config", folder / "empty.cnf"]
    more += ["-keyout", key, "-out", certificate, "-addext", f"subjectAltName={names}"]
    more += ["-addext", "basicConstraints=critical,CA:TRUE"]
    subprocess.run([*command.split(), *more], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context, certificate


class _Handler(BaseHTTPRequestHandler):
    """Answers a proxy's requests; after CONNECT, those that come through TLS."""

    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds without a further request, then the connection is closed
    origin = ""  # after CONNECT: https://host

    def do_CONNECT(self):
        host, port = self.path.rsplit(":", 1)
        self.send_response(200, "Connection established")
        self.end_headers()
        self.wfile.flush()
        try:
            self.connection = self.server.context.wrap_socket(self.connection, server_side=True)
        except (ssl.SSLError, OSError):  # the client does not trust the certificate, or is gone
            self.close_connection = True
            return
        self.rfile = self.connection.makefile("rb")
        self.wfile = self.connection.makefile("wb", 0)
        self.origin = f"https://{host}" if port == "443" else f"https://{host}:{port}"
        self.close_connection = False

    def do_GET(self):
        self._answer()

    def do_HEAD(self):
        self._answer()

    def _answer(self):
        server, url = self.server, self.origin + self.path
        with server.lock:
            server.counts[url] += 1
        if url in server.hang:
            server.closing.wait()
            self.close_connection = True
            return
        content = server.files.get(url, 404)
        if isinstance(content, pathlib.Path):
            content = content.read_bytes()
        status, body = (content, b"") if isinstance(content, int) else (200, content)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()
        if url in server.cut:
            body, self.close_connection = body[: len(body) // 2], True
        if self.command == "GET":
            self.wfile.write(body)

    def handle(self):
        try:
            super().handle()
        except OSError:  # the client is gone
            self.close_connection = True

    def finish(self):
        try:
            super().finish()
        finally:
            self.connection.close()  # TLS has taken it over from the server, which can't close it

    def log_message(self, format, *arguments):
        pass


class DataServer:
    """The internet, as a context manager.

    Args:
      files: the answer to GET and HEAD of each URL: the content, the file that holds it, or an
        HTTP status with an empty body. Of any other URL the answer is 404. The dict may be changed
        while the server runs.
      cut: URLs whose answers promise the whole content, send half of it and close the connection.
      hang: URLs that get no answer until the server closes.

    Attributes:
      counts: the number of requests for each URL, GET and HEAD together.
    """

    def __init__(
        self,
        files: Mapping[str, pathlib.Path | bytes | int],
        cut: Collection[str] = (),
        hang: Collection[str] = (),
    ):
        self.files, self.cut, self.hang = files, cut, hang
        self.counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> "DataServer":
        self._folder = tempfile.TemporaryDirectory(prefix="data_server_")
        try:
            hosts = {urlsplit(url).hostname for url in (*self.files, *self.cut, *self.hang)}
            context, certificate = tls_context(
                pathlib.Path(self._folder.name), hosts | {"storage.googleapis.com"}
            )
            self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        except BaseException:
            self._folder.cleanup()
            raise
        self._certificate, self._server.context = str(certificate), context
        self._server.files, self._server.cut, self._server.hang = self.files, self.cut, self.hang
        self._server.counts, self._server.lock = self.counts, threading.Lock()
        self._server.closing = threading.Event()
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._folder.cleanup()

    @property
    def proxy(self) -> str:
        """The URL of the proxy."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def environment(self) -> dict[str, str]:
        """Environment variables that send a child process's requests to this server."""
        proxies = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
        certificates = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")
        return {
            **dict.fromkeys(proxies, self.proxy),
            **dict.fromkeys(certificates, self._certificate),
            "NO_PROXY": "",
            "no_proxy": "",
        }
