"""How long a newcomer waits for one token, whatever others have sent, and how answers are shared.

python -m tests.benchmarks.fairness [--seconds 8] [--newcomers 5] [--attacks NAME ...] [--serve "--key-limit rows=4"]
Each attack has a server of its own with the embedded model. `urgent` counts answers in closed loops, of six connections
that send the most urgent priority there is and of four that send none; the others tell the seconds that newcomers,
each on a connection of its own, waited for one token, and what they were answered.
"""

import argparse
import http.client
import json
import shlex
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from tests.e2e.processes import served

LONG = {"prompt": "Tom has", "max_tokens": 2040, "ignore_eos": True, "sampler": "topk", "sampler_params": {"k": 1}}
SHORT = {"prompt": "Tom has", "max_tokens": 1}


class Client:
    """One connection."""

    def __init__(self, url: str) -> None:
        place = urlsplit(url)
        self.connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=600)

    def ask(self, body: dict[str, Any]) -> int:
        """The status of a completion's answer, once all of it is there."""
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
        answer = self.connection.getresponse()
        answer.read()
        return answer.status

    def send(self, body: dict[str, Any]) -> None:
        """Ask without waiting."""
        self.connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})


@contextmanager
def sent(url: str, bodies: list[dict[str, Any]]) -> Iterator[None]:
    """Requests on connections of their own, which are dropped at the end."""
    clients = [Client(url) for _ in bodies]
    for client, body in zip(clients, bodies, strict=True):
        client.send(body)
    time.sleep(1.5)
    try:
        yield
    finally:
        for client in clients:
            client.connection.close()


def newcomers(url: str, count: int) -> list[tuple[float, int]]:
    """Seconds and status of requests for one token, one after the other, each on a new connection."""
    found = []
    for _ in range(count):
        began = time.monotonic()
        client = Client(url)
        client.connection.timeout = 20
        try:
            status = client.ask(SHORT)
        except TimeoutError:
            status = 0
        found.append((time.monotonic() - began, status))
        client.connection.close()
    return found


def urgent(url: str, seconds: float) -> dict[str, list[int]]:
    """Answers that each connection got in a closed loop."""
    counts: Counter[int] = Counter()
    until = time.monotonic() + seconds

    def loop(i: int) -> None:
        client, body = Client(url), {"prompt": "Tom has", "max_tokens": 16, "ignore_eos": True, "n": 16}
        if i < 6:
            body["priority"] = -(2**63)
        while time.monotonic() < until:
            counts[i] += client.ask(body) == 200

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {"urgent": [counts[i] for i in range(6)], "others": [counts[i] for i in range(6, 10)]}


MANY = {**LONG, "prompt": ["Tom has"] * 16, "n": 16}
ATTACKS: dict[str, list[dict[str, Any]]] = {
    "nobody": [],
    "long": [{**LONG, "n": 16}],
    "flood": [MANY, MANY],
    "crowd": [LONG] * 40,
    "cached": [{**LONG, "n": 16, "cache": "dual"}, {**LONG, "n": 16, "cache": "prefix"}],
    "hurry": [{**LONG, "n": 16, "priority": -(2**63)}] * 6,
    "full": [{**LONG, "prompt": "Tom has " * 450, "max_tokens": 40, "n": 16}] * 6,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8)
    parser.add_argument("--newcomers", type=int, default=5)
    parser.add_argument("--attacks", nargs="*", default=["urgent", *ATTACKS])
    parser.add_argument("--serve", default="", help="further flags of the server")
    asked = parser.parse_args()
    for name in asked.attacks:
        with served("--threads", "2", *shlex.split(asked.serve), OMP_NUM_THREADS="2") as server:
            if name == "urgent":
                print(name, urgent(server.url, asked.seconds), flush=True)
                continue
            with sent(server.url, ATTACKS[name]):
                found = newcomers(server.url, asked.newcomers)
        seconds = [round(each, 2) for each, _ in found]
        print(name, f"longest {max(seconds):.2f} s", seconds, [status for _, status in found], flush=True)


if __name__ == "__main__":
    main()
