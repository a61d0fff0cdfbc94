"""`python -m tests.fuzz.properties --minutes 10`: property tests on fresh examples, round after round."""

import argparse
import random
import subprocess
import sys
import time


def main() -> int:
    """Run rounds until the time is over or one fails; the exit status is that of the last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="no round begins after so many")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; default: a fresh one")
    options = parser.parse_args()
    seed = random.randrange(2**31) if options.seed is None else options.seed
    end = time.monotonic() + 60 * options.minutes
    while True:
        command = ["-m", "pytest", "-q", "-m", "hypothesis", "--hypothesis-profile=fresh", f"--hypothesis-seed={seed}"]
        sys.stderr.write(f"examples of seed {seed}\n")
        status = subprocess.run([sys.executable, *command], check=False).returncode
        if status or time.monotonic() > end:
            return status
        seed += 1


if __name__ == "__main__":
    raise SystemExit(main())
