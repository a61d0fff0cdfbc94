"""`python -m tests.conformance [DIR] [--engine torch|vllm] [--json FILE]`: replay the fixtures under DIR."""

import argparse
import sys
from pathlib import Path

from tests.conformance.report import Result, Status, totals, write_json
from tests.conformance.runner import find_families, run


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a case failed, 2 if there is nothing to replay."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description=__doc__)
    parser.add_argument("folder", metavar="DIR", nargs="?", type=Path, default=Path("../shared/fixtures"))
    parser.add_argument("--engine", choices=("torch", "vllm"), default="torch")
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args(arguments)
    try:
        find_families(options.folder)
    except FileNotFoundError as error:
        parser.error(str(error))
    results: list[Result] = []
    for result in run(options.folder, options.engine):
        results.append(result)
        sys.stdout.write(result.line() + "\n")
        sys.stdout.flush()
    sys.stdout.write(totals(results) + "\n")
    if options.json:
        write_json(results, options.json)
    return int(any(result.status is Status.FAIL for result in results))


if __name__ == "__main__":
    sys.exit(main())
