"""How long `/health` takes while clients send all they can: many requests, long prompts, long chats.

python -m tests.benchmarks.health [--rounds 3] [--only PART] [--model DIR]

The server, who asks for `/health` and who sends the load are three processes, so that none of them waits for another's
interpreter. Each load is compared with the idle server of the same run: on a machine that others use, both are slower.
"""

import argparse
import http.client
import json
import multiprocessing
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from typing import Any

from tests.e2e.processes import served

PAUSE = 0.005
"""Seconds between two questions."""
LONG = 4_190_000
"""Bytes; just within the default limit on bodies."""
SECONDS = 4.0
"""A round of an idle server."""
Load = Callable[[], list[tuple[str, bytes]]]


def many() -> list[tuple[str, bytes]]:
    """A hundred short requests, for a queue of eight."""
    return [("/v1/completions", json.dumps({"prompt": "Tom has 3 apples.", "max_tokens": 16}).encode())] * 100


def prompts() -> list[tuple[str, bytes]]:
    """45 prompts of 4 MB."""
    return [("/v1/completions", json.dumps({"prompt": _words(LONG), "max_tokens": 1}).encode())] * 45


def tokenizing() -> list[tuple[str, bytes]]:
    """45 texts of 4 MB to be told the tokens of."""
    return [("/tokenize", json.dumps({"prompt": _words(LONG)}).encode())] * 45


def tokenizing_megabytes() -> list[tuple[str, bytes]]:
    """45 texts of 1 MB to be told the tokens of."""
    return [("/tokenize", json.dumps({"prompt": _words(1_000_000)}).encode())] * 45


def chats() -> list[tuple[str, bytes]]:
    """60 chats: a third short, a third of many messages, a third of 4 MB with what looks like control tokens."""
    long = [{"role": "user", "content": _words(LONG - 1_000_000) + "<|mdm_mask|>" * 80_000}]
    turns = [{"role": ("user", "assistant")[i % 2], "content": "Tom has 3 apples. < 4" * 4} for i in range(8001)]
    short = [{"role": "user", "content": "Tom has 3 apples. He buys 5 more."}]
    return [_chat(messages) for messages in (long, turns, short)] * 20


def lists() -> list[tuple[str, bytes]]:
    """20 bodies of many small things."""
    ids = b'{"max_tokens": 1, "prompt": [' + b",".join([b"17"] * 1_300_000) + b"]}"
    nested = b'{"max_tokens": 1, "prompt": [' + b",".join([b"[17]"] * 800_000) + b"]}"
    names = b'{"prompt": "a"' + b"".join(b',"k%d":0' % i for i in range(300_000)) + b"}"
    tokens = b'{"tokens": [' + b",".join([b"17"] * 1_000_000) + b"]}"
    return [*[("/v1/completions", body) for body in (ids, nested, names)], ("/detokenize", tokens)] * 5


LOADS: dict[str, Load] = {
    "100 at once, queue of 8": many,
    "45 prompts of 4 MB": prompts,
    "60 chats": chats,
    "45 texts of 4 MB to tokenize": tokenizing,
    "45 texts of 1 MB to tokenize": tokenizing_megabytes,
    "20 bodies of lists": lists,
}


def _words(size: int) -> str:
    return ("apples and pears " * (size // 17 + 1))[:size]


def _chat(messages: list[dict[str, str]]) -> tuple[str, bytes]:
    return "/v1/chat/completions", json.dumps({"messages": messages, "max_tokens": 2}).encode()


def send(port: int, name: str, results: Any) -> None:
    """Send all of a load at once, from as many connections; in a process of its own."""
    load = LOADS[name]()

    def one(request: tuple[str, bytes]) -> str:
        path, body = request
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        try:
            connection.request("POST", path, body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return str(answer.status)
        except OSError as error:
            return type(error).__name__
        finally:
            connection.close()

    began = time.perf_counter()
    with ThreadPoolExecutor(len(load)) as pool:
        statuses = Counter(pool.map(one, load))
    results.put((time.perf_counter() - began, dict(statuses)))


def ask(port: int, begun: Event, over: Event, results: Any) -> None:
    """Ask for `/health` until told to stop, on a connection that stays; in a process of its own."""
    took = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        begun.set()
        while not over.is_set():
            asked = time.perf_counter()
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(65536)
            assert answer.startswith(b"HTTP/1.1 200"), answer
            took.append(time.perf_counter() - asked)
            time.sleep(PAUSE)
    results.put(took)


def latencies(port: int, name: str | None) -> tuple[list[float], str]:
    """Seconds of each question during a load, or of an idle server; what became of the load."""
    spawn = multiprocessing.get_context("spawn")
    begun, over, asked, sent = spawn.Event(), spawn.Event(), spawn.Queue(), spawn.Queue()
    asking = spawn.Process(target=ask, args=(port, begun, over, asked))
    asking.start()
    begun.wait()
    told = "idle"
    if name is None:
        time.sleep(SECONDS)
    else:
        sending = spawn.Process(target=send, args=(port, name, sent))
        sending.start()
        seconds, statuses = sent.get()
        sending.join()
        told = f"{seconds:.1f} s, {statuses}"
    over.set()
    took: list[float] = asked.get()
    asking.join()
    return took, told


def row(name: str, took: Sequence[float], told: str) -> str:
    ordered = sorted(took)
    parts = [ordered[len(took) // 2], ordered[min(len(took) - 1, int(len(took) * 0.99))], ordered[-1]]
    return f"| {name} | {len(took)} | {' | '.join(f'{part * 1000:.1f}' for part in parts)} | {told} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="loads whose name holds this")
    parser.add_argument("--model", help="folder of a model; default: the embedded one")
    asked = parser.parse_args()
    given = ["--model", asked.model] if asked.model else []
    print("| load | questions | p50 ms | p99 ms | max ms | answers to the load |\n|---|---|---|---|---|---|")
    with served("--max-queue", "8", "--request-timeout", "120", *given) as process:
        port = int(process.url.rpartition(":")[2])
        for round in range(asked.rounds):
            for name in (None, *(each for each in LOADS if asked.only in each)):
                took, told = latencies(port, name)
                print(row(f"{name or 'idle'} ({round + 1})", took, told), flush=True)


if __name__ == "__main__":
    main()
