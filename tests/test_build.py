"""What a build puts into the files that users install."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_an_sdist_made_without_cuda_builds_with_it(tmp_path):
    """That is: it has every file of csrc, CUDA's too."""
    for name in ("csrc", "vllm_kivi"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    command = [sys.executable, "setup.py", "-q", "sdist", "--formats=tar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("dist/*.tar")
    with tarfile.open(archive) as files:
        packed = {Path(*Path(name).parts[1:]) for name in files.getnames()}
    sources = {path.relative_to(tmp_path) for path in tmp_path.glob("csrc/**/*.*")}
    assert Path("csrc/instantiate/decode.cu") in sources
    assert sources - packed == set()
