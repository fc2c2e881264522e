"""What a person installs: every file of every package is in the wheel, and every dependency is pinned and justified."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
PACKAGES = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]


def _canonical(requirement: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~\[;]", requirement)[0]).lower()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {_canonical(line): line.split("==")[1] for line in lines if not line.startswith("#")}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return zipfile.ZipFile(next(folder.glob("*.whl")))


def test_the_wheel_holds_every_file_of_every_package_and_nothing_else(wheel):
    in_tree = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert in_wheel == in_tree


def test_the_wheel_names_its_command_and_carries_its_licence(wheel):
    entries = {Path(name).name: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name}
    assert "sparse-transformers = training.cli:main" in entries["entry_points.txt"]
    assert "Apache License" in entries["LICENSE"] and "License-Expression: Apache-2.0" in entries["METADATA"]


def test_every_dependency_is_pinned():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    assert not {_canonical(line) for group in groups for line in group} - set(_pins())


def test_the_torch_pin_takes_the_build_of_the_machine():
    assert re.fullmatch(r"\d+\.\d+\.\d+", _pins()["torch"])


def test_every_run_time_dependency_is_imported_and_justified_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    source = "".join(path.read_text() for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
    for name in map(_canonical, PROJECT["dependencies"]):
        assert f"| `{name}` |" in readme, f"no line in the README says what {name} is for"
        assert re.search(rf"^\s*(import|from) {name}\b", source, re.MULTILINE), f"nothing imports {name}"
