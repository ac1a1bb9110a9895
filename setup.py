"""Builds vllm_kivi._C; the rest is in pyproject.toml. Build with --no-build-isolation, against the torch that is there.

One .so serves Python 3.11 and later (abi3) and torch 2.10 and later (libtorch's stable ABI). CUDA kernels are built
where torch is a CUDA build, or with torch's own FORCE_CUDA=1; TORCH_CUDA_ARCH_LIST chooses architectures, as for any
extension.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from glob import glob

import torch
from setuptools import setup
from torch.utils import cpp_extension
from torch.utils.cpp_extension import BuildExtension, CppExtension

AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
X86_FLAGS = {
    "csrc/cpu/kernels_avx512.cpp": [*AVX512, "-mfma", "-mf16c", "-mprefer-vector-width=512"],
    "csrc/cpu/kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/cpu/kernels_portable.cpp": [],
}
OTHER_FLAGS = {"csrc/cpu/kernels_portable.cpp": []}
KERNEL_FLAGS = X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else OTHER_FLAGS

COMMON_FLAGS = [
    "-O3",
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",  # GCC 12 warns of its own AVX-512 headers
    "-DTORCH_TARGET_VERSION=0x020A000000000000",
]

# torch does not look for CUDA where it is a CPU build itself.
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
if FORCE_CUDA and cpp_extension.CUDA_HOME is None:
    cpp_extension.CUDA_HOME = cpp_extension._find_cuda_home()
CUDA_HOME = cpp_extension.CUDA_HOME
WITH_CUDA = CUDA_HOME is not None and (torch.version.cuda is not None or FORCE_CUDA)
# Hopper is tuned; PTX of compute_80 serves what has no machine code. Where there is a GPU, its own will do.
ARCHITECTURES = ["8.0+PTX", "9.0a", "10.0", "12.0"]
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    ARCHITECTURES = ["9.0a" if major == 9 else f"{major}.{minor}"]
if "TORCH_CUDA_ARCH_LIST" in os.environ:
    ARCHITECTURES = os.environ["TORCH_CUDA_ARCH_LIST"].replace(";", " ").split()
NVCC_FLAGS = ["-O3", "-std=c++20", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
for architecture in ARCHITECTURES:
    number = architecture.removesuffix("+PTX").replace(".", "")
    NVCC_FLAGS.append(f"-gencode=arch=compute_{number},code=sm_{number}")
    if architecture.endswith("+PTX"):
        NVCC_FLAGS.append(f"-gencode=arch=compute_{number},code=compute_{number}")


class PerSourceFlags(BuildExtension):
    """Gives each kernel file the flags of its instruction set, and compiles files side by side.

    torch's build through ninja would do the second, but has one set of flags for all files.
    """

    def build_extensions(self):
        compiler = self.compiler
        compile_one = compiler._compile

        def compile_with_flags(obj, src, ext, cc_args, flags, pp_opts):
            if ext == ".cu":
                compiler.spawn([os.path.join(CUDA_HOME, "bin", "nvcc"), *NVCC_FLAGS, "-c", src, "-o", obj])
                return
            extra = next((flags for path, flags in KERNEL_FLAGS.items() if src.endswith(path)), [])
            compile_one(obj, src, ext, cc_args, [*flags, *extra], pp_opts)

        def compile_all(sources, output_dir, macros, include_dirs, debug, extra_postargs, depends):
            _, objects, flags, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, None)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda obj: compiler._compile(obj, *build[obj], cc_args, flags, pp_opts), objects))
            return objects

        compiler._compile = compile_with_flags
        compiler.compile = compile_all
        super().build_extensions()


setup(
    ext_modules=[
        CppExtension(
            "vllm_kivi._C",
            [
                "csrc/bindings.cpp",
                "csrc/cpu/dispatch.cpp",
                *KERNEL_FLAGS,
                *(sorted(glob("csrc/instantiate/*.cu")) if WITH_CUDA else []),
            ],
            # An sdist has them as well: .cu also where it is made without CUDA.
            depends=[
                "setup.py",
                *(path for end in ("h", "cu", "cuh", "inc") for path in glob(f"csrc/**/*.{end}", recursive=True)),
            ],
            define_macros=[("KIVI_CUDA", None)] if WITH_CUDA else [],
            # CUDA's runtime is linked statically: the file loads where there is none.
            library_dirs=[os.path.join(CUDA_HOME, "lib64")] if WITH_CUDA else [],
            libraries=["cudart_static", "rt", "dl", "pthread"] if WITH_CUDA else [],
            extra_compile_args={"cxx": COMMON_FLAGS},
            extra_link_args=["-Wl,--strip-all"],
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": PerSourceFlags.with_options(use_ninja=False)},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
