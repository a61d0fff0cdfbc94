"""Structured logging to standard error, for our own log lines and those of libraries."""

import logging
import signal
import sys
from io import StringIO
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger


def configure_logging(form: Literal["text", "json"] = "text") -> None:
    """Send all log lines to standard error in this format."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    if form == "json":
        render: list[Processor] = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        render = [
            escape_controls,
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), exception_formatter=plain_traceback),
        ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        cache_logger_on_first_use=True,
    )
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.INFO, force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # we log start and stop ourselves
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _Handler(logging.StreamHandler[TextIO]):
    """Drop lines that cannot be formatted or written, so that logging never fails its caller."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except KeyboardInterrupt:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # Ctrl-C without another handler
                raise
        except BaseException:  # e.g. the stream is closed, or the `repr` of a value exits
            return


def escape_controls(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Escape control characters, so that text chosen by a client cannot forge a log line or command the terminal."""
    return {key: escaped(value) if isinstance(value, str) else value for key, value in event.items()}


def escaped(text: str) -> str:
    """Text with all control characters and line breaks, Unicode's included, replaced by escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_traceback(file: TextIO, error: ExcInfo) -> None:
    """Write an indented traceback, so that no line of an exception's message looks like a line of the log.

    Plain, because the rich formats print local variables: slow, and these include keys and prompts.
    """
    buffer = StringIO()
    structlog.dev.plain_traceback(buffer, error)
    # Not splitlines(), which would keep the rarer line breaks of a message.
    file.write("\n".join(f"  {escaped(line)}" for line in buffer.getvalue().split("\n")))
