"""Compiles csrc for the CPU: sources become C++ in a copy, then a shared library."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch.utils.cpp_extension import get_cxx_compiler

CSRC = Path(__file__).parents[2] / "csrc"
CUDA = Path(__file__).parent / "cuda"
SUFFIXES = (".h", ".cuh", ".cu", ".inc")
# Files of csrc/instantiate that define decode_kernel_for<T, head_dim>: their T.
ELEMENTS = {"bf16": "__nv_bfloat16", "fp16": "__half"}

FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-w",  # nvcc's warnings are what counts
    "-ffp-contract=off",  # kernels say where they want one rounding
    "-fno-strict-aliasing",  # nor does nvcc assume it
    "-U_FORTIFY_SOURCE",  # whose longjmp takes fibers for a mistake
    "-fPIC",
    "-include",
    "cuda_runtime.h",  # as nvcc does
    "-fvisibility=hidden",  # statics in templates are each library's own
)
KEPT_BUILDS = 12

# (key bits, value bits, one in how many key channels is boosted or 0), as csrc/variants.inc lists them
Variant = tuple[int, int, int]


class BuildError(RuntimeError):
    """Says what the compiler said first."""


@dataclass(frozen=True)
class Build:
    """What to compile.

    Attributes:
        decode: which decode kernels, by file of csrc/instantiate: {"decode_bf16_64": [(2, 2, 0)]}.
        others: files of csrc/instantiate besides decode.cu, which is always there.
        bulk_copies: False for copies as on sm_80.
        changes: what is changed in csrc before: file, text that is there once, text instead.
    """

    decode: Mapping[str, Sequence[Variant]]
    others: Sequence[str] = ("store", "gather")
    bulk_copies: bool = True
    changes: Sequence[tuple[str, str, str]] = ()


def all_variants() -> dict[str, list[Variant]]:
    """All that variants.inc lists, for every file."""
    rows = re.findall(r"DO\((\d+), (\d+)(?:, (\d+))?, __VA_ARGS__\)", (CSRC / "variants.inc").read_text())
    variants = [(int(k_bits), int(v_bits), int(boost or 0)) for k_bits, v_bits, boost in rows]
    return {path.stem: variants for path in sorted((CSRC / "instantiate").glob("decode_*.cu"))}


def compile_for_cpu(build: Build, cache: Path) -> Path:
    """The shared library of `build`; made if `cache` does not have it.

    Raises:
        BuildError: the compiler refuses.
    """
    compiler, flags = get_cxx_compiler(), [*FLAGS, f"-DKIVI_BULK_COPIES={int(build.bulk_copies)}", f"-I{CUDA}"]
    sources = _sources(build)
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    stand_ins = [(path.name, path.read_text()) for path in sorted(CUDA.iterdir())]
    library = cache / f"{hashlib.sha256(repr((sources, stand_ins, flags, version)).encode()).hexdigest()[:16]}.so"
    if library.exists():
        os.utime(library)
        return library
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        for path, text in sources.items():
            (folder / path).parent.mkdir(exist_ok=True)
            (folder / path).write_text(text)
        units = sorted(
            folder.glob("instantiate/*.cu"), key=lambda unit: unit.stem not in build.others
        )  # long ones first

        def compile_one(unit: Path) -> str:
            wanted = str(unit.with_suffix(".o"))
            _run([compiler, *flags, f"-I{folder}", "-x", "c++", "-c", str(unit), "-o", wanted])
            return wanted

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, units))
        _run([compiler, "-shared", "-o", f"{folder}/library.so", *objects])
        os.replace(folder / "library.so", library)  # at once: other sessions may look for it
    for old in sorted(cache.glob("*.so"), key=lambda path: path.stat().st_mtime)[:-KEPT_BUILDS]:
        old.unlink()
    return library


def _sources(build: Build) -> dict[str, str]:
    """By path: csrc without what is not compiled, as C++."""
    sources = {path.name: path.read_text() for path in sorted(CSRC.iterdir()) if path.suffix in SUFFIXES}
    for name in ("decode", *build.others, *build.decode):
        sources[f"instantiate/{name}.cu"] = (CSRC / "instantiate" / f"{name}.cu").read_text()
    for path, old, new in build.changes:
        if sources[path].count(old) != 1:
            raise BuildError(f"{path} does not have this once: {old}")
        sources[path] = sources[path].replace(old, new)
    for path, text in sources.items():
        sources[path] = _as_cpp(text)
    del sources["ptx.cuh"]  # so that the one in CUDA is found

    # Each file of decode kernels has its own lists.
    for name, variants in build.decode.items():
        bits = " ".join(f"DO({k_bits}, {v_bits}, __VA_ARGS__)" for k_bits, v_bits, boost in variants if not boost)
        boosted = " ".join("DO({}, {}, {}, __VA_ARGS__)".format(*variant) for variant in variants if variant[2])
        own = "".join(
            f"#undef KIVI_CUDA_{kind}\n#define KIVI_CUDA_{kind}(DO, ...) {rows}\n"
            for kind, rows in (("BITS", bits), ("BOOSTED", boosted))
        )
        path = f"instantiate/{name}.cu"
        sources[path] = sources[path].replace("\nnamespace", f"\n{own}\nnamespace", 1)
    absent = [path.stem for path in (CSRC / "instantiate").glob("decode_*.cu") if path.stem not in build.decode]
    instances = "\n".join(
        f"template <> const void* decode_kernel_for<{_parameters(name)}>(const Layout&) {{ return nullptr; }}"
        for name in sorted(absent)
    )
    # One unit for all that is small: most of what it takes to compile are headers.
    includes = "\n".join(f'#include "{path.name}"' for path in sorted(CUDA.glob("*.cpp")))
    launch = sources["instantiate/decode.cu"].replace("\nnamespace {", f"\n{instances}\n\nnamespace {{", 1)
    sources["instantiate/decode.cu"] = f"{includes}\n{launch}"
    return sources


def _parameters(name: str) -> str:
    _, element, head_dim = name.split("_")
    return f"{ELEMENTS[element]}, {head_dim}"


def _as_cpp(text: str) -> str:
    text = re.sub(
        r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];",
        r"\1* const \2 = reinterpret_cast<\1*>(emulation::dynamic_shared);",
        text,
    )
    return re.sub(r"(\w+(?:<[^;<>]*>)?)\s*<<<([^;]*?)>>>", r"emulation::configured(\1, \2)", text)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise BuildError("the CUDA kernels do not compile for the CPU:\n" + "\n".join(lines[:10]))
