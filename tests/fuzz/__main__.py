"""`python -m tests.fuzz [--requests N] [--seed S] [--family F]... [--process] [--only INDEX]`"""

import argparse
import secrets
import sys
import tempfile
import time
from pathlib import Path

import structlog

from tests.fuzz.campaign import Campaign
from tests.fuzz.families import FAMILIES, Subject
from tests.fuzz.servers import here, process


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=1000, help="cases, each of which is sent several times")
    parser.add_argument("--seed", type=int, help="of the requests (default: a fresh one, which is printed)")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="default: all of them (repeatable)")
    parser.add_argument("--process", action="store_true", help="ask `unmask serve`, not an app in this process")
    parser.add_argument("--only", metavar="INDEX", type=int, help="one case of a seed and family, as a failure told it")
    options = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    serve = process if options.process else here
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    names = options.family or list(FAMILIES)
    say(f"seed {seed}")
    wrong = 0
    for place, name in enumerate(names):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(Subject.make(name, Path(folder)), serve, seed)
            count = options.requests // len(names) + (place < options.requests % len(names))
            report = campaign.run(range(count) if options.only is None else [options.only])
        distinct = report.distinct()
        wrong += len(distinct)
        say(
            f"{name}: {report.answered} answered, {report.refused} refused, {report.sent} sent, "
            f"{len(report.failures)} failures of {len(distinct)} kinds, {time.monotonic() - started:.0f} s"
        )
        for (_, sampler), failures in distinct.items():
            say(f"  {len(failures)} x {sampler}, {failures[0].lines()}")
    return int(wrong > 0)


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
