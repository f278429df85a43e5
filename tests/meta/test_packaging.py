"""The wheel holds the four packages and nothing else, and lives beside other distributions."""

import configparser
import email
import email.message
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.meta.repository import copy_repository_files, repository_files

PACKAGES = ["edge_runtime", "engines", "calib", "bench"]
EXTRAS = [
    "bench",
    "calib",
    "cpu",
    "dev",
    "export",
    "jetson",
    "jtop",
    "loop",
    "tensorrt",
    "train",
    "video",
]


def package_files() -> list[str]:
    """Return the repository's files of the four packages; measured results lie beside the code."""
    files = repository_files(*PACKAGES)
    return [name for name in files if not name.startswith("bench/results/")]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    environment = os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def build_wheel(source: Path, folder: Path) -> Path:
    """Build a wheel from `source`, without the network, with the setuptools that is here."""
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Our wheel, built from a copy: a build in place would mix in what an older one left."""
    folder = tmp_path_factory.mktemp("wheel")
    metadata = ["setup.py", "pyproject.toml", "README.md", "LICENSE"]
    copy_repository_files(folder / "source", *metadata, *PACKAGES)
    return build_wheel(folder / "source", folder)


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return email.message_from_bytes(archive.read(name))


def test_the_wheel_holds_exactly_the_four_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    extra = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert sorted(names - extra) == package_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= names
    assert "edge_runtime/backends/cuda/decide.cu" in names
    assert {name.rpartition("/")[2] for name in extra} == {
        "LICENSE",
        "METADATA",
        "RECORD",
        "WHEEL",
        "entry_points.txt",
        "top_level.txt",
    }


def test_only_code_is_in_the_packages():
    suffixes = {Path(name).suffix for name in package_files()}
    assert suffixes <= {".py", ".typed", ".cu"}


def test_the_metadata(metadata):
    assert metadata["Name"] == "edge-runtime"
    assert metadata["Version"] == "0.1.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (metadata["License-Expression"], metadata["License"])
    assert metadata["Summary"]
    assert metadata.get_payload().startswith("# ")


def test_the_base_install_needs_numpy_only(metadata):
    requirements = metadata.get_all("Requires-Dist")
    assert [line for line in requirements if "extra ==" not in line] == ["numpy"]


def test_the_extras(metadata):
    assert sorted(metadata.get_all("Provides-Extra")) == EXTRAS


def test_the_command(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        entries = configparser.ConfigParser()
        entries.read_string(archive.read(name).decode())
    assert dict(entries["console_scripts"]) == {"edge-runtime": "edge_runtime.cli:main"}


def test_doctor_names_another_distribution_that_owns_bench(wheel, tmp_path):
    source, site = tmp_path / "source", tmp_path / "site"
    (source / "bench").mkdir(parents=True)
    (source / "bench" / "__init__.py").write_text('"""Another project\'s top-level package."""\n')
    (source / "bench" / "scales.py").touch()
    (source / "setup.py").write_text(
        "from setuptools import setup\n"
        "setup(name='weighbridge', version='1.0', packages=['bench'])\n"
    )
    other = build_wheel(source, tmp_path)
    pip("install", "--no-deps", "--target", site, other, wheel)

    result = subprocess.run(
        [sys.executable, site / "bin" / "edge-runtime", "doctor"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    said = result.stdout + result.stderr
    assert "Traceback" not in said, said
    assert "bench" in said, said
    assert "weighbridge" in said, said
