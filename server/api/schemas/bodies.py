"""Parsing of a request's bytes to a validated body, or to an error that names the field."""

from collections.abc import Iterator
from functools import partial
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.api.errors import MAX_PARAM, BadHeaderError, UnsupportedEncodingError, shortened
from server.api.schemas.fields import refusal
from server.api.schemas.requests import Body, ChatBody, GenerationBody, SamplerArguments, TokenizeBody
from server.api.text_threads import TextThreads
from server.engine import Owner, RequestError

SMALL = 16 * 1024
"""Bytes up to which a body is parsed on the event loop: handing it to another thread would take longer."""
MAX_SHOWN = 60
"""Characters quoted of a wrong value."""
MAX_CONTAINERS = 10_000
"""Maximum number of lists and objects in a body."""
MAX_MEMBERS = 30_000
"""Maximum number of fields of all objects in a body."""
MAX_VALUES = 500_000
"""Maximum number of values in all lists and objects of a body."""
PART = 64 * 1024
"""Bytes of a body scanned at a time."""
MAX_UNKNOWN = 100
"""Maximum number of unknown fields of a body; each is compared with all known ones."""

SIGNATURES = {
    b"\xef\xbb\xbf": "begins with a byte order mark (BOM)",
    b"\xff\xfe": "begins with a byte order mark (BOM) and is UTF-16 or UTF-32",
    b"\xfe\xff": "begins with a byte order mark (BOM) and is UTF-16",
    b"\x00\x00\xfe\xff": "begins with a byte order mark (BOM) and is UTF-32",
    b"{\x00": "is UTF-16 or UTF-32",
    b"\x00": "is UTF-16 or UTF-32",
    b"\x1f\x8b": "is compressed (gzip)",
    b"\x28\xb5\x2f\xfd": "is compressed (zstd)",
}
"""First bytes of bodies that are not JSON, for clearer messages than the parser's."""

B = TypeVar("B", bound=Body)


async def read_body(threads: TextThreads, owner: Owner, request: Request, cls: type[B]) -> B:
    """Parse the request's JSON body; a long one off the event loop, in the order of `TextThreads`.

    Raises RequestError, BadHeaderError, UnsupportedEncodingError, QueueFullError, NotServingError or, from the body
    limit, BodyTooLargeError.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    # Web pages of other sites can send any other type without a CORS preflight.
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise BadHeaderError(f"content-type is {show(kind)}: send JSON as application/json")
    for header in ("content-encoding", "transfer-encoding"):
        codings = {coding.strip().lower() for coding in ",".join(request.headers.getlist(header)).split(",")}
        if packed := codings - {"", "identity", "chunked"}:
            coding = show(", ".join(sorted(packed)))
            raise UnsupportedEncodingError(f"{header} is {coding}: send the body as it is, without compression")
    data = await request.body()
    if len(data) > SMALL:
        return await threads.run(partial(parse_body, data, cls), owner, len(data))
    return parse_body(data, cls)


def parse_body(data: bytes, cls: type[B]) -> B:
    """Parse and validate a body. Raises RequestError."""
    if (found := next((what for start, what in SIGNATURES.items() if data.startswith(start)), None)) is not None:
        raise RequestError("body", f"the request's body {found}: send plain UTF-8", "invalid_json")
    check_counts(data)
    try:
        body = cls.model_validate_json(data)
    except ValidationError as error:
        raise request_error(error.errors(include_url=False, include_context=False)[0]) from None
    refuse_fields(body)
    return body


def check_counts(data: bytes) -> None:
    """Raise RequestError if JSON has too many parts: parsed, they take far more memory than its bytes."""
    # Texts may contain any of these signs. If there are few including those in texts, the exact count is not needed.
    if _exceeded_limit(*_count_separators(data)) is None:
        return
    containers = members = values = 0
    for part in _without_strings(data):
        more = _count_separators(part)
        containers, members, values = containers + more[0], members + more[1], values + more[2]
        if (limit := _exceeded_limit(containers, members, values)) is not None:
            raise RequestError("body", f"the body holds more than {limit}: send less at a time", "too_many_values")


def _count_separators(data: bytes) -> tuple[int, int, int]:
    """Number of containers opened, of fields and of values, by their separators."""
    return data.count(b"[") + data.count(b"{"), data.count(b":"), data.count(b",")


def _exceeded_limit(containers: int, members: int, values: int) -> str | None:
    """Limit exceeded by these counts; None if there is none."""
    if containers > MAX_CONTAINERS:
        return f"{MAX_CONTAINERS} lists and objects"
    if members > MAX_MEMBERS:
        return f"{MAX_MEMBERS} fields"
    return f"{MAX_VALUES} values" if values > MAX_VALUES else None


def _without_strings(data: bytes) -> Iterator[bytes]:
    """JSON without the content of its strings, in parts."""
    data = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside = 0
    for start in range(0, len(data), PART):
        parts = data[start : start + PART].split(b'"')
        yield b"".join(parts[inside::2])
        inside = (inside + len(parts) - 1) % 2


def refuse_fields(body: Body) -> None:
    """Raise RequestError for the first field at any depth that is neither known nor harmless."""
    unknown: set[str] = set()
    top = _given_fields(body)
    for where, part in _parts(body):
        extra = part.model_extra
        if not extra:
            continue
        unknown |= extra.keys()
        if len(unknown) > MAX_UNKNOWN:
            raise RequestError("body", f"more than {MAX_UNKNOWN} fields of the body are not known", "unknown_parameter")
        given = top if part is body else _given_fields(part)
        for name, value in extra.items():
            if isinstance(part, SamplerArguments) and name in top and top[name] == value:
                continue  # repeats another field of the body
            if (instead := refusal(type(part), name, given)) is not None:
                field = shortened(f"{where}{name}", MAX_PARAM)
                raise RequestError(
                    field, f"{field} is not supported (got {show(value)}): {instead}", "unsupported_value"
                )
    if isinstance(body, ChatBody | TokenizeBody):
        _refuse_template_arguments(top.get("chat_template_kwargs"))


def _given_fields(part: BaseModel) -> dict[str, Any]:
    """All fields that were given, known or unknown."""
    extra = part.model_extra or {}
    return {name: getattr(part, name) for name in part.model_fields_set - extra.keys()} | extra


def _parts(body: Body) -> Iterator[tuple[str, BaseModel]]:
    """The body and its nested parts that accept unknown fields, each with the prefix of its field names."""
    yield "", body
    if isinstance(body, GenerationBody):
        for name in ("stream_options", "vllm_xargs"):
            if (part := getattr(body, name)) is not None:
                yield f"{name}.", part
    if isinstance(body, ChatBody | TokenizeBody):
        for i, message in enumerate(body.messages or []):
            yield f"messages.{i}.", message


def _refuse_template_arguments(arguments: Any) -> None:
    """Raise RequestError for arguments to the chat template, except those that switch something off."""
    if arguments is None or arguments == "":
        return
    field, value = "chat_template_kwargs", arguments
    if isinstance(arguments, dict):
        asking = [name for name, value in arguments.items() if value not in (None, False)]
        if not asking:
            return
        field, value = shortened(f"{field}.{asking[0]}", MAX_PARAM), arguments[asking[0]]
    raise RequestError(field, f"{field} is not supported (got {show(value)}): leave it out", "unsupported_value")


def request_error(error: ErrorDetails, where: tuple[str, ...] = ()) -> RequestError:
    """Convert a validation error to a RequestError that names the field, the value and the limit."""
    if error["type"] == "json_invalid":
        return RequestError("body", f"the request's body is not JSON: {error['msg']}", "invalid_json")
    # Parts in parentheses are tags of unions, which clients do not know.
    path = [str(part) for part in (*where, *error["loc"]) if not str(part).startswith("(")]
    field = shortened(".".join(path) or "body", MAX_PARAM)
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ")
    if error["type"] == "missing":
        return RequestError(field, f"{field} is missing", "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return RequestError(field, f"{field} is not known (got {show(error['input'])})", "unknown_parameter")
    return RequestError(field, f"{field}: {message} (got {show(error['input'])})")


def show(value: Any) -> str:
    """A value for an error message, shortened."""
    if isinstance(value, int) and value.bit_length() > MAX_SHOWN * 3:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value[: MAX_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."
