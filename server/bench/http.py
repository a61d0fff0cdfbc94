"""Streaming through the API over a socket, relative to the engine alone."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from server.bench.engine import TimedEngine
from server.bench.results import Result, alternate, ratio_of
from server.bench.subjects import BenchModel


def measure_http(
    subject: BenchModel, model: Path | None, rounds: int, concurrent: tuple[int, ...], threads: int | None = None
) -> Iterator[Result]:
    """Tokens per second of streams relative to the engine, with the same prompts and weights.

    Args:
        model: folder for the server to load; None is the embedded model.
        threads: number of threads of the server; the engine alone uses those of this process.
    """
    running = TimedEngine(subject)
    with serving(model, threads) as url:
        for count in concurrent:
            requests = running.requests(subject.prompts[:count], "topk", {"steps": subject.steps}, False)

            def alone(requests: list[Any] = requests) -> float:
                seconds, tokens, _ = running.run(requests)
                return tokens / seconds

            def streamed(count: int = count) -> float:
                began = time.perf_counter()
                tokens = asyncio.run(stream_all(url, subject, subject.prompts[:count]))
                return tokens / (time.perf_counter() - began)

            over, under = alternate(streamed, alone, rounds)
            yield ratio_of(
                f"http_vs_engine_{count}",
                "throughput ratio",
                over,
                under,
                model=subject.name,
                gen_length=subject.gen_length,
                block_length=subject.block_length,
                steps=subject.steps,
                engine_tokens_per_second=under[0],
            )
    running.engine.drain()


@contextlib.contextmanager
def serving(model: Path | None, threads: int | None = None, environment: dict[str, str] | None = None) -> Iterator[str]:
    """A separate server process on a free port. Raises RuntimeError if it does not start.

    Args:
        environment: environment variables in addition to those of this process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = [] if model is None else ["--model", str(model)]
    given += [] if threads is None else ["--threads", str(threads)]
    command = [sys.executable, "-m", "server.cli", "serve", *given, "--port", str(port), "--dtype", "float32"]
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [*command, "--max-batch", "64"], stderr=subprocess.DEVNULL, env=os.environ | (environment or {})
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"the server ended with status {process.returncode}")
            with contextlib.suppress(OSError), direct.open(f"{url}/ready", timeout=2):
                break
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()


async def stream_all(url: str, subject: BenchModel, prompts: list[list[int]]) -> int:
    """Stream all prompts concurrently. Returns the number of tokens received."""
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        return sum(await asyncio.gather(*(_stream(client, subject, prompt) for prompt in prompts)))


async def _stream(client: httpx.AsyncClient, subject: BenchModel, prompt: list[int]) -> int:
    body = {
        "prompt": prompt,
        "max_tokens": subject.gen_length,
        "block_length": subject.block_length,
        "sampler": "topk",
        "sampler_params": {"steps": subject.steps},
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    tokens = 0
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                tokens = usage["completion_tokens"]
    return tokens
