"""Compiles csrc for GPUs that are not here, and fails if a decode kernel spills registers.

    python scripts/check_cuda.py [--arch 80 90a 120] [--all]

Decode for float16 differs from that for bfloat16 by its type alone: without --all it is compiled for 90a only, which is
tuned. Takes nvcc from PATH, or the one that pip installed beside this Python (`make cuda`). Needs no GPU and no torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "instantiate").glob("*.cu"))
TUNED, TWIN = "90a", "_fp16_"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def find_nvcc() -> str:
    installed = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path=str(installed))
    if nvcc is None:
        raise SystemExit("nvcc is not on PATH; `make cuda` installs one")
    return nvcc


def compile_one(nvcc: str, source: Path, arch: str, folder: str) -> tuple[str, str, str]:
    """Its name, the architecture, and what the compiler said; the output begins with 'failed' if it refused."""
    command = [nvcc, "-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xptxas=-v", "-c", str(source)]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-o", f"{folder}/{source.stem}-{arch}.o"]
    done = subprocess.run(command, capture_output=True, text=True)
    return source.stem, arch, ("failed\n" if done.returncode else "") + done.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=["80", "90a", "120"])
    parser.add_argument("--all", action="store_true", help="every file for every architecture")
    args = parser.parse_args()
    nvcc, failed = find_nvcc(), False
    print("| file | sm | kernels | most registers | most spilled bytes |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            (nvcc, source, arch, folder)
            for source in reversed(SOURCES)  # store takes longest
            for arch in args.arch
            if args.all or arch == TUNED or TWIN not in source.name
        ]
        for name, arch, log in pool.map(lambda job: compile_one(*job), jobs):
            kernels = [match.groupdict() for match in KERNEL.finditer(log)]
            if log.startswith("failed"):
                failed = True
                print(f"| {name} | {arch} | does not compile | | |\n{log}", flush=True)
                continue
            spilled = max((int(kernel["stores"]) + int(kernel["loads"]) for kernel in kernels), default=0)
            registers = max((int(kernel["registers"]) for kernel in kernels), default=0)
            print(f"| {name} | {arch} | {len(kernels)} | {registers} | {spilled} |", flush=True)
            failed |= "decode" in name and spilled > 0
    if failed:
        sys.exit("a kernel does not compile, or a decode kernel spills registers")


if __name__ == "__main__":
    main()
