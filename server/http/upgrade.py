"""Requests that offer a protocol upgrade, which is never made."""

from collections.abc import Iterator


def head_without_upgrade(method: bytes, url: bytes, version: str, headers: list[tuple[bytes, bytes]]) -> bytes:
    """Head of a request without its upgrade offer, as it could have been sent."""
    line = b" ".join([method, url, f"HTTP/{version}".encode()])
    return b"\r\n".join([line, *(b": ".join(header) for header in _without_upgrade(headers)), b"", b""])


def _without_upgrade(headers: list[tuple[bytes, bytes]]) -> Iterator[tuple[bytes, bytes]]:
    """Headers of a request without its upgrade offer."""
    for name, value in headers:
        if name in (b"upgrade", b"http2-settings"):
            continue
        if name == b"connection":
            tokens = [token.strip() for token in value.split(b",")]
            value = b", ".join(token for token in tokens if token.lower() not in (b"upgrade", b"http2-settings"))
            if not value:
                continue
        yield name, value
