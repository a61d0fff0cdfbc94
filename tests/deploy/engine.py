"""A private container engine under .image/: Debian's buildah and podman, their own storage, no registry.

The base image is a stand-in for python:3.11-slim-bookworm, made from Debian packages. What this machine needs to reach
its package index (certificates, folders of wheels) is mounted for the build and never becomes part of the image.
"""

import os
import shutil
import subprocess
from pathlib import Path

from tests.deploy.checkout import ROOT

HOME = ROOT / ".image"
IMAGE = "localhost/unmask:test"
BASE = "docker.io/library/python:3.11-slim-bookworm"
PROGRAMS = {
    "buildah": "buildah",
    "podman": "podman",
    "runc": "runc",
    "mmdebstrap": "mmdebstrap",
    "docker-compose": "docker-compose",
    "prometheus": "prometheus",
    "iptables": "iptables",
}
LIBRARIES = ["netavark", "aardvark-dns", "catatonit", "ca-certificates"]

STORAGE = """
[storage]
driver = "overlay"
graphroot = "{home}/root"
runroot = "{home}/run"
"""
# Limits and the cgroup manager are what works without systemd and without CAP_SYS_RESOURCE.
CONTAINERS = """
[containers]
default_ulimits = ["nofile=16384:16384", "nproc=8192:8192"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
[network]
network_backend = "netavark"
"""
BASE_FILE = """
FROM scratch
ADD base.tar /
RUN rm -f /usr/lib/python3*/EXTERNALLY-MANAGED \\
 && ln -s /usr/bin/python3 /usr/local/bin/python && ln -s /usr/bin/python3 /usr/local/bin/python3
ENV PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8
"""


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "CONTAINERS_STORAGE_CONF": str(HOME / "storage.conf"),
        "CONTAINERS_CONF": str(HOME / "containers.conf"),
    }


def run(*command: str | Path, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run in the private engine's environment. What it printed is in the error when it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} exited {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def podman(*arguments: str, timeout: float = 120, check: bool = True) -> subprocess.CompletedProcess[str]:
    return run("podman", *arguments, timeout=timeout, check=check)


def prepare() -> None:
    """Programs, configuration and base image; what is there already is kept."""
    if os.geteuid() != 0:
        raise RuntimeError("building and running images here needs root")
    missing = [package for program, package in PROGRAMS.items() if not shutil.which(program)]
    if missing:
        run("apt-get", "update", "-qq", timeout=300)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends"]
        run(*install, *missing, *LIBRARIES, timeout=900)
    HOME.mkdir(exist_ok=True)
    (HOME / "storage.conf").write_text(STORAGE.format(home=HOME))
    (HOME / "containers.conf").write_text(CONTAINERS)
    if podman("image", "exists", BASE, check=False).returncode:
        _make_base()


def _make_base() -> None:
    unfinished = HOME / "unfinished.tar"
    if not (HOME / "base.tar").exists():
        packages = "--include=ca-certificates,python3,python3-venv"
        run("mmdebstrap", "--variant=minbase", packages, "bookworm", unfinished, timeout=900)
        unfinished.rename(HOME / "base.tar")
    (HOME / "Base").write_text(BASE_FILE)
    build(BASE, HOME / "Base", HOME)


def build(image: str, file: Path, context: Path, *options: str) -> None:
    fixed = ["--isolation", "chroot", "--pull-never", "--format", "docker", "--layers"]
    run("buildah", "bud", *fixed, *options, "-t", image, "-f", file, context, timeout=1500)


def package_index_mounts() -> list[str]:
    """Options that lend the build this machine's certificates and folder of wheels, where it has them."""
    configuration, mounts = ["[global]"], []
    if certificates := os.environ.get("PIP_CERT") or os.environ.get("SSL_CERT_FILE"):
        configuration.append("cert = /etc/ssl/certs/ca-certificates.crt")
        mounts += ["-v", f"{certificates}:/etc/ssl/certs/ca-certificates.crt:ro"]
    for number, wheels in enumerate(os.environ.get("PIP_FIND_LINKS", "").split()):
        configuration.append(f"{'find-links =' if number == 0 else '   '} /wheels{number}")
        mounts += ["-v", f"{wheels}:/wheels{number}:ro"]
    (HOME / "pip.conf").write_text("\n".join(configuration) + "\n")
    return ["-v", f"{HOME}/pip.conf:/etc/pip.conf:ro", *mounts]
