"""An image from a URL, where a user allows it: with limits, and from public addresses alone."""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
import urllib.parse
from collections.abc import Collection, Iterator

from stf_jax.data.forms import shorten
from stf_jax.data.images import ImageError

URL_SCHEMES = ("http://", "https://")

MAX_BYTES = 32 * 2**20
SECONDS = 20.0
REDIRECTS = 3

_BLOCK = 2**16
_UNICAST = ipaddress.ip_network("2000::/3")


class _FetchError(Exception):
    """Why nothing was fetched, in a few words."""


def fetch(url: str, *, hosts: Collection[str] | None = None) -> bytes:
    """What lies at a URL: at most `MAX_BYTES`, in at most `SECONDS`, over at most `REDIRECTS`.

    A host that is an address of this machine or of a private network is not asked, by whatever
    name. Proxies are not used.

    Args:
        url: of http or https.
        hosts: those that may be asked, redirects included; None is any.

    Raises:
        ImageError: nothing was fetched, and why.
    """
    deadline = time.monotonic() + SECONDS
    where = url
    try:
        for _ in range(REDIRECTS + 1):
            if hosts is not None and urllib.parse.urlsplit(where).hostname not in hosts:
                raise _FetchError("it leads to a host that is not allowed")
            data, onward = _get(where, deadline)
            if onward is None:
                return data
            where = urllib.parse.urljoin(where, onward)
        raise _FetchError(f"more than {REDIRECTS} redirects")
    except (_FetchError, OSError, ValueError, http.client.HTTPException) as error:
        late = time.monotonic() >= deadline
        reason = f"not there within {SECONDS:g} s" if late else str(error) or type(error).__name__
        raise ImageError(
            f"{shorten(url)}: cannot be fetched ({shorten(reason)}); fetch it yourself and give "
            "its path"
        ) from error


def _get(url: str, deadline: float) -> tuple[bytes, str | None]:
    """The body, or where a redirect leads."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _FetchError("no URL of http or https")
    with _connect(parts, deadline) as connection:
        target = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        target = urllib.parse.quote(target, safe=string.punctuation)
        connection.request("GET", target, headers={"User-Agent": "stf-jax", "Accept": "image/*"})
        # A response that is left open keeps the socket open, too.
        with connection.getresponse() as response:
            if response.status in (301, 302, 303, 307, 308):
                return b"", response.getheader("Location") or ""
            if response.status != 200:
                raise _FetchError(f"status {response.status} {response.reason}")
            data = bytearray()
            while block := response.read(_BLOCK):
                data += block
                if len(data) > MAX_BYTES:
                    raise _FetchError(f"more than {MAX_BYTES // 2**20} MiB")
            if response.length or time.monotonic() >= deadline:
                raise _FetchError("cut short")
            return bytes(data), None


@contextlib.contextmanager
def _connect(
    parts: urllib.parse.SplitResult, deadline: float
) -> Iterator[http.client.HTTPConnection]:
    """A connection to the address that was looked at: a name may lead elsewhere the next time."""
    host, secure = parts.hostname or "", parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    remaining = max(deadline - time.monotonic(), 0.01)
    connection = http.client.HTTPConnection(host, port)
    with socket.create_connection((_public_address(host, port), port), timeout=remaining) as plain:
        wrapped = plain
        if secure:
            wrapped = ssl.create_default_context().wrap_socket(
                plain, server_hostname=host, do_handshake_on_connect=False
            )
        # A server that sends a byte now and then would outlast any timeout of the socket's own.
        guard = threading.Timer(remaining, _cut, [wrapped])
        guard.daemon = True
        guard.start()
        try:
            if isinstance(wrapped, ssl.SSLSocket):
                wrapped.do_handshake()
            connection.sock = wrapped
            yield connection
        finally:
            guard.cancel()
            connection.close()
            wrapped.close()


def _cut(connected: socket.socket) -> None:
    # Of the plain socket, whatever TLS is at.
    with contextlib.suppress(OSError):
        socket.socket.shutdown(connected, socket.SHUT_RDWR)


def _public_address(host: str, port: int) -> str:
    records = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[0]) for *_, address in records]
    if not addresses or not all(_is_public(address) for address in addresses):
        raise _FetchError("an address of this machine or of a private network")
    return addresses[0]


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # The rest of IPv6 leads to IPv4 addresses of any kind, or nowhere.
        inside = parsed.sixtofour or parsed.teredo
        return parsed.is_global and parsed in _UNICAST and not inside
    return parsed.is_global and not parsed.is_multicast
