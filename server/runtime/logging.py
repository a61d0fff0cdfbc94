"""Log lines: structured, on standard error, ours and those of libraries alike."""

import logging
import signal
import sys
from io import StringIO
from typing import Literal, TextIO

import structlog
from structlog.typing import EventDict, ExcInfo, Processor, WrappedLogger


def configure_logging(form: Literal["text", "json"] = "text") -> None:
    """Send all log lines to standard error in this form."""
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
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it says of starting and stopping, we say
    logging.getLogger("httpx").setLevel(logging.WARNING)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes what it can: a line that cannot be made or written is lost, and whoever logs it goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except KeyboardInterrupt:
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a user's, which nothing else handles
                raise
        except BaseException:  # the stream is closed, say, or a value exits when it is shown
            return


def escape_controls(logger: WrappedLogger, name: str, event: EventDict) -> EventDict:
    """Let no text in a line begin another line or command the terminal; clients choose some of these texts."""
    return {key: escaped(value) if isinstance(value, str) else value for key, value in event.items()}


def escaped(text: str) -> str:
    """A text whose control characters and line breaks, of all kinds, are written as escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def plain_traceback(file: TextIO, error: ExcInfo) -> None:
    """Write a traceback, indented, so that no line of an exception's message looks like a line of the log.

    Plain, because the pretty ones print local variables: slow, and keys and prompts are among them.
    """
    buffer = StringIO()
    structlog.dev.plain_traceback(buffer, error)
    # Not splitlines(), which would leave the rarer line breaks of a message as they are.
    file.write("\n".join(f"  {escaped(line)}" for line in buffer.getvalue().split("\n")))
