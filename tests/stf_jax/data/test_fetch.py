"""Images from URLs, against a server on this machine that does all that one should not."""

import http.server
import io
import threading
import time
from collections.abc import Iterator

import pytest
from PIL import Image

from stf_jax.data import fetch as module
from stf_jax.data.fetch import fetch
from stf_jax.data.images import ImageError


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 3), "red").save(file, "PNG")
    return file.getvalue()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        name = self.path.partition("?")[0]
        if name.startswith("/redirect"):
            self.send_response(302)
            left = int(name.removeprefix("/redirect"))
            self.send_header("Location", f"/redirect{left - 1}" if left else "/image.png")
            self.end_headers()
            return
        if name.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{name.removeprefix('/to/')}:9/")
            self.end_headers()
            return
        if name == "/elsewhere":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        if name in ("/image.png", "/%C3%A9.png"):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png())
        elif name == "/cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(png())
        elif name in ("/endless", "/slow"):
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(bytes(2**20 if name == "/endless" else 1))
                    time.sleep(0 if name == "/endless" else 0.02)
            except OSError:
                return
        else:
            self.send_error(404)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as served:
        served.daemon_threads = True
        threading.Thread(target=served.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://localhost:{served.server_port}"
        served.shutdown()


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine counts as public."""
    monkeypatch.setattr(module, "_is_public", lambda address: True)


@pytest.mark.parametrize("path", ["/image.png", "/é.png?a=b c", "/redirect2"])
def test_an_image_is_what_lies_at_the_url(server: str, allowed: None, path: str) -> None:
    assert fetch(f"{server}{path}") == png()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/nothing", "status 404 Not Found"),
        ("/redirect3", "more than 3 redirects"),
        ("/elsewhere", "no URL of http or https"),
        ("/cut", "cut short"),
        ("/endless", "more than 1 MiB"),
        ("/slow", "not there within 0.5 s"),
    ],
)
def test_what_is_beyond_a_limit_is_one_line(
    server: str, allowed: None, monkeypatch: pytest.MonkeyPatch, path: str, message: str
) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 2**20)
    monkeypatch.setattr(module, "SECONDS", 0.5)
    begun = time.monotonic()
    with pytest.raises(ImageError, match=message) as error:
        fetch(f"{server}{path}")
    assert time.monotonic() - begun < 2
    assert "\n" not in str(error.value)
    assert "fetch it yourself and give its path" in str(error.value)


@pytest.mark.parametrize(
    "host",
    [
        "localhost", "127.0.0.1", "127.1", "2130706433", "10.0.0.1", "192.168.1.1", "172.16.0.1",
        "169.254.169.254", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]",
        "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "224.0.0.1", "100.64.0.1",
    ],
)  # fmt: skip
def test_this_machine_and_its_network_are_not_asked(host: str) -> None:
    with pytest.raises(ImageError, match="an address of this machine or of a private network"):
        fetch(f"http://{host}:9/")


@pytest.mark.parametrize("host", ["169.254.169.254", "10.0.0.1", "[::ffff:10.0.0.1]"])
def test_a_redirect_leads_to_no_private_address(
    server: str, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr(module, "_is_public", lambda address: address in ("127.0.0.1", "::1"))
    with pytest.raises(ImageError, match="an address of this machine or of a private network"):
        fetch(f"{server}/to/{host}")


def test_a_redirect_leads_to_no_host_that_is_not_named(server: str, allowed: None) -> None:
    with pytest.raises(ImageError, match="a host that is not allowed"):
        fetch(f"{server}/to/example.com", hosts={"localhost"})


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["93.184.215.14", "10.0.0.1"], ["::1"], []])
def test_a_name_that_leads_to_this_network_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str]
) -> None:
    """One private address among others is enough, since any of them may be taken next."""
    found = [(0, 0, 0, "", (address, 9)) for address in addresses]
    monkeypatch.setattr(module.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(ImageError, match="an address of this machine or of a private network"):
        fetch("http://images.example.com:9/", hosts={"images.example.com"})


def test_no_port_and_no_host_are_refused() -> None:
    for url in ("http://", "http://a:b/", "https://", "http://\n/"):
        with pytest.raises(ImageError, match="cannot be fetched"):
            fetch(url)
