"""Ray's nodes, all on this machine: each is a `ray start` with a loopback address and GPUs of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import environment, terminate, until

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


@dataclass(frozen=True)
class Cluster:
    """The processes of the nodes, and what an engine on the first one needs in its environment."""

    nodes: list[subprocess.Popen[Any]]
    environment: dict[str, str]


@contextmanager
def ray_node(
    gpus: str, address: str, options: list[str], log: Path, changes: dict[str, str]
) -> Iterator[subprocess.Popen[Any]]:
    """One node with these GPUs at this address of the machine, up when entered."""
    # Ray would start a process for each CPU in advance, take a third of the memory for objects, and end a worker when
    # the machine is short of memory, whoever has it.
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=2"]
    command += [f"--num-gpus={gpus.count(',') + 1}", f"--object-store-memory={1 << 28}", "--disable-usage-stats"]
    changes = changes | {"CUDA_VISIBLE_DEVICES": gpus, "VLLM_HOST_IP": address, **LOOPBACK}
    changes |= {"PYTHONUNBUFFERED": "1", "RAY_memory_monitor_refresh_ms": "0"}
    with log.open("w") as stream:
        command += [f"--node-ip-address={address}", *options]
        node = subprocess.Popen(command, env=environment(**changes), stdout=stream, stderr=subprocess.STDOUT)

    def started() -> bool:
        assert node.poll() is None, log.read_text()[-3000:]
        return "Ray runtime started" in log.read_text()

    try:
        until(started, f"Ray's node {address}")
        yield node
    finally:
        terminate(node)


@contextmanager
def ray_cluster(nodes: tuple[str, ...], folder: Path, **changes: str) -> Iterator[Cluster]:
    """Nodes with these GPUs, as CUDA_VISIBLE_DEVICES; their logs are in the folder.

    Args:
        changes: of the environment, of the nodes and of the engine.
    """
    from vllm.utils.network_utils import get_open_port

    # Every machine has as many loopback addresses as it likes. Ray takes 127.0.0.1 for "look for a better one".
    addresses = [f"127.0.0.{2 + index}" for index in range(len(nodes))]
    port = get_open_port()
    head = f"{addresses[0]}:{port}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as sockets, ExitStack() as stack:
        options = ["--head", f"--port={port}", "--include-dashboard=false", f"--temp-dir={sockets}"]
        started = []
        for gpus, address in zip(nodes, addresses, strict=True):
            log = folder / f"node-{address}.log"
            started.append(stack.enter_context(ray_node(gpus, address, options, log, changes)))
            options = [f"--address={head}"]
        yield Cluster(started, changes | {"RAY_ADDRESS": head, "VLLM_HOST_IP": addresses[0], **LOOPBACK})
