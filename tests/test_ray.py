"""Tensor parallelism through Ray, on one node and on two, on CPUs."""

from __future__ import annotations

import os
import subprocess

import psutil
import pytest
import ray_cpu_platform
import torch
from engines import save_tiny_llama
from processes import assert_gone, environment, family
from ray_cluster import ray_cluster
from test_engine_processes import PROMPTS, UNSEARCHED, read, started_elsewhere

SETTINGS = {"enforce_eager": True, "tensor_parallel_size": 2} | UNSEARCHED
TWO_CPUS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Through multiprocessing."""
    folder = tmp_path_factory.mktemp("mp")
    with started_elsewhere(folder, model, SETTINGS, PROMPTS, **TWO_CPUS) as (_, _, out):
        return read(out)[1]


def workers(node: subprocess.Popen) -> list[psutil.Process]:
    return [process for process in family(node) if process.cmdline()[:1] == ["ray::RayWorkerProc.run"]]


@pytest.mark.parametrize("nodes", [("0,1",), ("0", "1")], ids=["one node", "two nodes"])
def test_ray_equals_multiprocessing(model, expected, tmp_path, nodes):
    """To the bit; and when a worker is killed, the engine says so and ends."""
    ray_cpu_platform.install(tmp_path)
    path = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    with ray_cluster(nodes, tmp_path, PYTHONPATH=path, **TWO_CPUS) as cluster:
        settings = SETTINGS | {"distributed_executor_backend": "ray"}
        elsewhere = started_elsewhere(tmp_path, model, settings, PROMPTS, forever=True, **cluster.environment)
        with elsewhere as (process, log, out):
            _, outputs = read(out)
            assert [len(workers(node)) for node in cluster.nodes] == [2 // len(nodes)] * len(nodes)
            processes = family(process)
            workers(cluster.nodes[-1])[-1].kill()
            assert_gone(process, processes)
            assert process.returncode != 0
            assert "EngineDeadError" in log.read_text()
    for (actual, scores), (wanted, other) in zip(outputs, expected, strict=True):
        assert actual == wanted
        assert torch.equal(scores, other)
