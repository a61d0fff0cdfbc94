import shutil
import subprocess
import sys
from email import message_from_bytes
from email.message import Message
from zipfile import ZipFile

import pytest

from tests.deploy.checkout import ROOT

PACKAGES = ("policies", "samplers", "server")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    # From a copy: setuptools leaves a build folder behind, and would pack what it finds in an old one.
    checkout, target = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("wheel")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, checkout / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "tests").mkdir()
    (checkout / "tests/__init__.py").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", target, checkout], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.glob("unmask-*.whl")
    return ZipFile(built)


def metadata(wheel: ZipFile) -> Message:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(wheel.read(name))


def test_holds_our_packages_and_nothing_else(wheel: ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top == set(PACKAGES)
    assert not [name for name in wheel.namelist() if "__pycache__" in name]


def test_holds_every_file_of_the_packages(wheel: ZipFile) -> None:
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    ours = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert ours <= set(wheel.namelist())


def test_says_what_it_is(wheel: ZipFile) -> None:
    says = metadata(wheel)
    assert (says["Name"], says["License-Expression"], says["Requires-Python"]) == ("unmask", "Apache-2.0", ">=3.11")
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())
    (entry_points,) = (name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt"))
    assert "unmask = server.cli:main" in wheel.read(entry_points).decode()


def test_pins_torch_exactly(wheel: ZipFile) -> None:
    required = [line for line in metadata(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line for line in required if line.startswith("torch")] == ["torch==2.13.0"]
