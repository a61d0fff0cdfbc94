"""`python -m tests.soak [--minutes M] [--seed S] [--only NAME]...`"""

import argparse
import secrets
import sys

from tests.soak.campaign import EMBEDDED, NAMED, soak
from tests.soak.judging import judge, table

SHARE = 0.5
"""Part of the time that the embedded model gets; tiny ones of the families share the rest."""


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="all in all (default: 30)")
    parser.add_argument("--seed", type=int, help="of what clients do (default: a fresh one, which is printed)")
    parser.add_argument("--only", action="append", choices=NAMED, help="default: all of them in turn (repeatable)")
    options = parser.parse_args(arguments)
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    say(f"seed {seed}")
    wrong = 0
    for name, minutes in shares(options.only or NAMED, options.minutes).items():
        outcome = soak(name, 60 * minutes, seed)
        problems = list(judge(outcome))
        wrong += len(problems)
        say(table(outcome))
        for problem in problems[:20]:
            say(f"  WRONG: {problem}")
        say(f"{name}: {len(problems)} problems\n")
    return int(wrong > 0)


def shares(names: list[str], minutes: float) -> dict[str, float]:
    """The minutes of each."""
    others = [name for name in names if name != EMBEDDED]
    if len(others) == len(names) or not others:
        return dict.fromkeys(names, minutes / len(names))
    return {name: minutes * (SHARE if name == EMBEDDED else (1 - SHARE) / len(others)) for name in names}


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
