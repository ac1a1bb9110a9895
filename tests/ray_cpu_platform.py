"""vLLM's CPU platform with what Ray is to give out: stock vLLM names nothing there, and so refuses Ray on CPUs.

A plugin of vLLM's own kind (vllm.platform_plugins), for test_ray.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"  # Ray numbers nothing else; a node has as many as `ray start` is told
    ray_noset_device_env_vars: ClassVar[list[str]] = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]


def register() -> str:
    return f"{__name__}.{RayCpuPlatform.__name__}"


def install(folder: Path) -> None:
    """Where the folder is on PYTHONPATH, vLLM uses it."""
    info = folder / "ray_cpu_platform-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu-platform\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[vllm.platform_plugins]\nray_cpu = {__name__}:{register.__name__}\n")
