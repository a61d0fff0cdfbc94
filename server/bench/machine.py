"""Machine that a figure was measured on: a figure means little without processor, instruction sets and load."""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from server.runtime.processors import allowed

TELL = "import torch; x = torch.ones(8, 8); x @ x; x.to_mkldnn()"
"""Program that makes both libraries do work, so that their logs name the instruction set in use."""


def machine() -> dict[str, Any]:
    """Processor, instruction sets in use, threads, and load before the measurements."""
    return {
        "processor": processor(),
        "instructions": instructions(),
        "cores": os.cpu_count(),
        "allowed_cores": len(allowed()),
        "threads": torch.get_num_threads(),
        "load": [round(each, 2) for each in os.getloadavg()],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


def in_words(machine: dict[str, Any]) -> str:
    """The description as text for a terminal."""
    sets = "; ".join(f"{library} {found or 'unknown'}" for library, found in machine["instructions"].items())
    return (
        f"{machine['processor']}, {machine['threads']} threads on {machine['allowed_cores']} of {machine['cores']} "
        f"cores, load {machine['load'][0]}, torch {machine['torch']}, {machine['device']}\ninstructions: {sets}"
    )


def processor() -> str:
    """Model name of the processor as given by the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def instructions() -> dict[str, str | None]:
    """Instruction sets used by torch's own loops, oneDNN and MKL; None if a library does not report it.

    The environment can restrict each of them (ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA, MKL_ENABLE_INSTRUCTIONS). The
    latter two report it only in their logs, which a separate process writes.
    """
    loud = os.environ | {"ONEDNN_VERBOSE": "1", "MKL_VERBOSE": "1"}
    told = subprocess.run([sys.executable, "-c", TELL], env=loud, capture_output=True, text=True, check=True).stdout
    onednn = re.search(r"^onednn_verbose,.*,cpu,isa:(.+)$", told, re.MULTILINE)
    mkl = re.search(r"^MKL_VERBOSE .* architecture (.+?), (?:Lnx|Win|Mac)", told, re.MULTILINE)
    return {
        "torch": torch.backends.cpu.get_cpu_capability(),
        "onednn": onednn and onednn[1].strip(),
        "mkl": mkl and mkl[1].strip(),
    }
