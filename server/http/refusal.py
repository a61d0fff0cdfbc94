"""Responses that refuse a request before the application sees it."""

from http import HTTPStatus

from server.api.errors import HeadersTooLargeError, UrlTooLongError, error_response
from server.http.progress import MAX_HEAD
from server.http.transport import STATUS_LINE


def refusal(error: Exception) -> bytes:
    """Complete response for an error, after which the connection closes."""
    response = error_response(error)
    head = [*response.raw_headers, (b"connection", b"close")]
    status = STATUS_LINE + f"{response.status_code} {HTTPStatus(response.status_code).phrase}".encode()
    lines = [status, *(b": ".join(header) for header in head)]
    return b"\r\n".join([*lines, b"", bytes(response.body)])


def head_error(in_head: bool, url: bytes) -> Exception:
    """Error for a request whose head, or whose body's framing, is too long."""
    limit = f"longer than {MAX_HEAD} bytes"
    if not in_head:
        return HeadersTooLargeError(f"the body's trailers or extensions of chunks are {limit}")
    if len(url) > MAX_HEAD // 2:
        return UrlTooLongError(f"the request's URL and headers are {limit}")
    return HeadersTooLargeError(f"the request's headers are {limit}")
