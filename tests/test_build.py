"""What a build puts into the files that users install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A copy of the sources with the Python part of a wheel in wheel/, and an sdist in dist/."""
    path = tmp_path_factory.mktemp("built")
    for name in ("csrc", "vllm_kivi"):
        shutil.copytree(ROOT / name, path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, path)
    command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "wheel", "sdist", "--formats", "tar"]
    done = subprocess.run(command, cwd=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return path


def files_below(path: Path, folder: str) -> set[Path]:
    return {file.relative_to(path) for file in (path / folder).rglob("*") if file.is_file()}


def test_an_sdist_made_without_cuda_builds_with_it(built):
    """That is: it has every file of csrc, CUDA's too."""
    (archive,) = built.glob("dist/*.tar")
    with tarfile.open(archive) as files:
        packed = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    sources = files_below(built, "csrc")
    assert Path("csrc/instantiate/decode.cu") in sources
    assert sources - packed == set()


def test_a_wheel_has_every_file_of_the_package(built):
    """And py.typed, without which mypy takes it for untyped."""
    files = files_below(built, "vllm_kivi")
    assert Path("vllm_kivi/py.typed") in files
    assert files - files_below(built / "wheel", "vllm_kivi") == set()
