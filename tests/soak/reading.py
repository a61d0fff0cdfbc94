"""What a server's process holds, read from outside."""

import re
from dataclasses import dataclass
from pathlib import Path

import httpx

GAUGES = {
    "running": "dllm_requests_running",
    "waiting": "dllm_requests_waiting",
    "tasks": "dllm_event_loop_tasks",
}


@dataclass(frozen=True)
class Reading:
    """A process at one moment.

    Attributes:
        memory: bytes that are resident, its child processes' too.
        descriptors: open files and sockets.
        threads: of the operating system, Python's and others'.
        children: child processes, and theirs.
        tasks: of the event loop.
        running: generations in the batch.
        waiting: generations in the queue.
    """

    memory: int
    descriptors: int
    threads: int
    children: int
    tasks: int
    running: int
    waiting: int


def read(pid: int, url: str) -> Reading:
    """Ask the system about a process, and the process about itself, on a connection that is closed then."""
    text = httpx.get(f"{url}/metrics", trust_env=False, timeout=60).raise_for_status().text
    gauges = {
        name: int(float(re.findall(rf"^{metric}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)[0]))
        for name, metric in GAUGES.items()
    }
    children = descendants(pid)
    return Reading(
        memory=sum(resident(each) for each in [pid, *children]),
        descriptors=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=len(list(Path(f"/proc/{pid}/task").iterdir())),
        children=len(children),
        **gauges,
    )


def resident(pid: int) -> int:
    """Bytes of memory that a process has."""
    (kilobytes,) = re.findall(r"^VmRSS:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(kilobytes) * 1024


def descendants(pid: int) -> list[int]:
    """Child processes of a process, and theirs."""
    found: list[int] = []
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, listed.read_text().split()):
            found += [child, *descendants(child)]
    return found
