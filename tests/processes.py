"""Engines and servers in processes of their own: what they inherit, how to wait for them, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

PATIENCE, START = 60, 400  # seconds, for what takes less than 15, and for starts


def environment(**changes: str) -> dict[str, str]:
    """For a process that runs an engine as users do: in processes of its own, which find these helpers."""
    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")}
    return (
        env | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "HF_HUB_OFFLINE": "1"} | changes
    )


def until(condition: Callable[[], Any], what: str, seconds: float = PATIENCE) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


def family(process: subprocess.Popen[Any]) -> list[psutil.Process]:
    parent = psutil.Process(process.pid)
    return [parent, *parent.children(recursive=True)]


def kill(processes: list[psutil.Process], title: str) -> None:
    next(process for process in processes if process.cmdline()[0].startswith(title)).send_signal(signal.SIGKILL)


def assert_gone(process: subprocess.Popen[Any], processes: list[psutil.Process]) -> None:
    """A process and all that were its family."""
    try:
        process.wait(timeout=PATIENCE)
    finally:
        alive = end(processes)
    assert not alive, f"still there after {PATIENCE} s: {alive}"


def end(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that had to be killed."""
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE)
    for process in alive:
        process.kill()
    return alive


def terminate(process: subprocess.Popen[Any]) -> None:
    if process.poll() is None:
        processes = family(process)
        process.terminate()
        end(processes)
