"""The virtual environment that `make` keeps: never half there, and never of a Python that is too old."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.deploy.checkout import ROOT, plain_environment

# A Python that may say something else of itself, and makes an environment with an empty pip, which takes no time.
PYTHON = """#!/bin/sh
case $1 in
-c) shift; exec {python} -c "import sys; {disguise}; $*" ;;
-m) {python} "$@" --without-pip && cd "$3"/lib/python*/site-packages && mkdir pip-1.dist-info &&
    echo "Name: pip" > pip-1.dist-info/METADATA && echo pip-1.dist-info/RECORD,, > pip-1.dist-info/RECORD ;;
esac
"""
# As Debian's without python3-venv: it begins, and fails.
HALF = """#!/bin/sh
[ "$1" = -m ] || exec {python} "$@"
{python} "$@" --without-pip
echo "ensurepip is not available" >&2
exit 1
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the environment is made from."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / ".ci", folder / ".ci")
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    python(tmp_path / "bin" / "python3")
    return folder


def python(path: Path, disguise: str = "pass", script: str = PYTHON) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(script.format(python=sys.executable, disguise=disguise))
    path.chmod(0o755)
    return path


def old_python(path: Path) -> Path:
    return python(path, "sys.version_info = (3, 9, 18)")


def make(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["make", *arguments, ".venv/.made"]
    environment = plain_environment() | {"PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=120)


def made(checkout: Path, *arguments: str) -> None:
    """Run make, which must leave a whole environment and have nothing to do afterwards."""
    done = make(checkout, *arguments)
    assert done.returncode == 0, done.stderr
    within = [checkout / ".venv" / "bin" / "python", "-c", "import importlib.metadata as m; m.version('pip')"]
    assert subprocess.run(within, capture_output=True, check=False).returncode == 0
    assert make(checkout, "--question", *arguments).returncode == 0


def refused(checkout: Path, named: object) -> str:
    """Run make, which must fail with one line of its own."""
    done = make(checkout, f"PYTHON={named}")
    assert done.returncode == 2
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make: ***")]
    assert len(ours) == 1, done.stderr
    return ours[0]


def test_the_versions_named_are_the_projects() -> None:
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f"OLDEST={needed.removeprefix('>=')}\n" in (ROOT / ".ci/venv").read_text()
    assert f"Python {needed.removeprefix('>=')}" in (ROOT / "README.md").read_text().partition("```")[0]


def test_a_real_python_makes_a_real_one(checkout: Path) -> None:
    made(checkout, f"PYTHON={sys.executable}")
    pip = [checkout / ".venv" / "bin" / "python", "-m", "pip", "--version"]
    assert subprocess.run(pip, capture_output=True, check=False).returncode == 0


def test_a_python_that_is_too_old_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    old = old_python(tmp_path / "python3.9")
    said = refused(checkout, old)
    assert said == f"Error: '{old}' is Python 3.9.18, but Unmask needs 3.11 or newer: make serve PYTHON=python3.11"
    assert not (checkout / ".venv").exists()
    assert "'no-such-python' is no Python that runs" in refused(checkout, "no-such-python")
    assert not (checkout / ".venv").exists()
    made(checkout)


def test_a_python_that_cannot_make_one_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    assert refused(checkout, python(tmp_path / "half", script=HALF)) == "ensurepip is not available"
    assert not (checkout / ".venv").exists()


def test_what_works_is_kept(checkout: Path, tmp_path: Path) -> None:
    made(checkout)
    kept = checkout / ".venv" / "kept"
    kept.touch()
    made(checkout)
    made(checkout, f"PYTHON={tmp_path / 'bin' / 'python3'}")
    (checkout / ".venv" / ".made").unlink()  # as one that was made by hand
    made(checkout)
    refused(checkout, old_python(tmp_path / "python3.9"))
    assert kept.exists(), "what works is not given up for what would not"


def test_an_environment_of_an_old_python_is_replaced(checkout: Path) -> None:
    """As an earlier Makefile left it: with a stamp."""
    made(checkout)
    (checkout / ".venv" / "kept").touch()
    old_python(checkout / ".venv" / "bin" / "python")
    made(checkout)
    assert not (checkout / ".venv" / "kept").exists()


def test_an_environment_of_another_python_than_the_one_asked_for_is_replaced(checkout: Path, tmp_path: Path) -> None:
    made(checkout)
    (checkout / ".venv" / "kept").touch()
    another = python(tmp_path / "another", "sys.base_prefix = '/opt/another'")
    done = make(checkout, f"PYTHON={another}")
    assert done.returncode == 0, done.stderr
    assert not (checkout / ".venv" / "kept").exists()


@pytest.mark.parametrize("fault", ["no python", "no pip", "half of pip", "copied", "a file"])
def test_a_broken_environment_is_replaced(checkout: Path, fault: str) -> None:
    venv = checkout / ".venv"
    if fault == "a file":
        venv.touch()
    else:
        made(checkout)
        (venv / "left").touch()
        (pip,) = venv.glob("lib/python*/site-packages/pip-*.dist-info")
    if fault == "no python":
        (venv / "bin" / "python").unlink()
        (venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    if fault == "no pip":
        shutil.rmtree(pip)
    if fault == "half of pip":
        (pip / "RECORD").unlink()
    if fault == "copied":
        (venv / "bin" / "unmask").write_text("#!/elsewhere/.venv/bin/python\n")
    made(checkout)
    assert not (venv / "left").exists()


def test_no_text_tells_to_install_from_an_index() -> None:
    """The distribution is on none: what is told works in a checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = [name for name in listing.split("\0") if name.endswith((".md", ".py", ".toml", ".yaml", "file"))]
    told = re.compile(r"pip install (?:-\S+ )*['\"]?unmask\b")
    assert not [name for name in names if (ROOT / name).exists() and told.search((ROOT / name).read_text())]
