"""Tensor parallelism on two GPUs and the Ray executor, checked end to end: one table, and an exit code of 1 if a line
of it fails.

    python tests/gpu/parallel_check.py [--only auto,kivi2,kivi2-tp2] [--output FOLDER] [--timeout 150]

The random Llama, the requests and the distances of engine_check.py. Each run is an engine in a process of its own, so
that one that crashes or hangs costs only the checks that need it; its answers and its log go to FOLDER. With --only the
answers of other runs are taken from there, if an earlier call left them. The machine plays Ray's nodes as well; those
runs need Ray (pip install ray).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pickle
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
# The engine's core stays in the process of its run, as there: when requests arrive would otherwise decide who shares a
# batch, and no two runs would agree to the last bit.
from engine_check import ENGINE, LONG, MODEL, SHORT, answers, capacity, distance, forced, logprob_differences  # noqa: E402
from engines import engine, save_tiny_llama, tokens  # noqa: E402
from processes import environment, terminate  # noqa: E402
from ray_cluster import ray_cluster  # noqa: E402
from results import Results  # noqa: E402

TP2 = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
RAY = TP2 | {"distributed_executor_backend": "ray"}
# vLLM sets it in Ray's workers and makes it part of the key of its compile cache. Set for all runs, they share their
# compiled code; the compiler chooses by timing, so that another compilation may round otherwise.
COMPILED_ONCE = {"RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1"}


@dataclass(frozen=True)
class Run:
    cache: str
    settings: dict[str, Any] = field(default_factory=dict)
    nodes: tuple[str, ...] = ()  # of Ray: the GPUs of each, as CUDA_VISIBLE_DEVICES


RUNS = {
    "auto": Run("auto"),
    "auto-tp2": Run("auto", TP2),
    "float16-tp2": Run("auto", TP2 | {"dtype": "float16"}),
    "kivi2": Run("kivi2"),
    "kivi2-tp2": Run("kivi2", TP2),
    "kivi8-tp2": Run("kivi8", TP2),
    "kivi2-ray": Run("kivi2", RAY, ("0,1",)),
    # vLLM finds by shared memory that both nodes are one machine, and would look for the other's GPU in its own list.
    "kivi2-nodes": Run("kivi2", RAY | {"disable_custom_all_reduce": True}, ("0", "1")),
}


def whereabouts(worker: Any) -> tuple[str, str]:
    """Called in a worker: its GPU, and the address of its node if Ray started it."""
    import torch
    from vllm.ray.lazy_utils import is_in_ray_actor

    cuda = worker.device.type == "cuda"
    gpu = str(torch.cuda.get_device_properties(worker.device).uuid) if cuda else f"process {os.getpid()}"
    if not is_in_ray_actor():
        return gpu, ""
    import ray

    return gpu, ray.util.get_node_ip_address()


def measure(run: Run, model: Path, out: Path) -> None:
    """In a process of its own: one engine, and what it answered."""
    start = time.perf_counter()
    with engine(model, run.cache, **(ENGINE | run.settings)) as llm:
        found = {
            "capacity": capacity(llm),
            "blocks": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
            "workers": llm.collective_rpc(whereabouts),
            "started": time.perf_counter() - start,
            "short": answers(llm, SHORT),
            "long": answers(llm, LONG),
            "forced": forced(llm),
        }
        out.write_bytes(pickle.dumps(found))


def attempt(name: str, model: Path, folder: Path, seconds: float) -> str:
    """Run one engine; returns why it left no answers, if so."""
    out, log = folder / f"{name}.pickle", folder / f"{name}.log"
    out.unlink(missing_ok=True)
    with ExitStack() as stack:
        nodes = RUNS[name].nodes
        changes = stack.enter_context(ray_cluster(nodes, folder)).environment if nodes else {}
        command = [sys.executable, __file__, "--measure", name, str(model), str(out)]
        with log.open("w") as stream:
            env = environment(**COMPILED_ONCE, **changes)
            process = subprocess.Popen(command, env=env, stdout=stream, stderr=subprocess.STDOUT)
        try:
            reason = f"ended with code {process.wait(timeout=seconds)}"
        except subprocess.TimeoutExpired:
            reason = f"took more than {seconds:.0f} s"
        finally:
            terminate(process)
    if out.exists():
        return ""
    print(log.read_text()[-3000:], file=sys.stderr, flush=True)
    return reason


class Comparison(Results):
    """Checks on what runs answered; one whose run left nothing raises a KeyError."""

    def __init__(self, found: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.found = found

    def close(self, what: str, requests: str, run: str, other: str, bound: float) -> None:
        ours, theirs = self.found[run][requests], self.found[other][requests]
        try:
            mean, text = distance(ours, theirs)
        except ZeroDivisionError:
            mean, text = math.inf, "not one likely token in common"
        self.add(what, text, f"at most {bound:.4f}", mean <= bound)

    def noise(self) -> float:
        """What bfloat16 does to vLLM's own cache."""
        return distance(self.found["float16-tp2"]["long"], self.found["auto-tp2"]["long"])[0]

    def loss(self, run: str, auto: str) -> float:
        """What quantization costs."""
        return distance(self.found[run]["forced"], self.found[auto]["forced"])[0]

    def same(self, what: str, run: str, other: str) -> None:
        largest = 0.0
        for requests in ("short", "long", "forced"):
            ours, theirs = self.found[run][requests], self.found[other][requests]
            if [tokens(output) for output in ours] != [tokens(output) for output in theirs]:
                largest = math.inf
            largest = max([largest, *logprob_differences(ours, theirs)])
        self.add(what, f"{largest:.2g}", "0, to the last bit", largest == 0)

    def workers(self, run: str, nodes: int) -> None:
        """That it ran where it should have."""
        gpus, addresses = (len(set(values)) for values in zip(*self.found[run]["workers"], strict=True))
        self.add(
            f"{run}: where",
            f"{gpus} GPUs, {addresses} nodes",
            f"2 GPUs, {nodes} nodes",
            (gpus, addresses) == (2, nodes),
        )

    def auto(self) -> None:
        self.close("auto: two GPUs against one", "long", "auto-tp2", "auto", self.noise())

    def one_against_two(self) -> None:
        self.workers("kivi2-tp2", 1)
        one, two = self.found["kivi2"], self.found["kivi2-tp2"]
        for key, name in (("capacity", "tokens"), ("blocks", "blocks")):
            # As many bytes on each GPU, and half of the heads.
            ratio = two[key] / one[key]
            self.add(f"kivi2: {name} on two GPUs", f"{two[key]:,}, {ratio:.3f}x", "2x one GPU's", abs(ratio - 2) < 0.02)
        loss = self.loss("kivi2", "auto")
        # A rounding makes values at the edge of a code take the other one; a wrong head or scale costs more than that.
        self.close("kivi2: two GPUs against one", "forced", "kivi2-tp2", "kivi2", loss / 2)
        ratio = self.loss("kivi2-tp2", "auto-tp2") / loss
        self.add(
            "kivi2: what quantization costs",
            f"{ratio:.2f}x one GPU's {loss:.4f}",
            "0.8x to 1.25x",
            0.8 <= ratio <= 1.25,
        )

    def against_auto(self) -> None:
        """Where quantization is no larger than rounding, a wrong head, code or page shows."""
        self.close("kivi2, up to 128 tokens, against auto", "short", "kivi2-tp2", "auto-tp2", self.noise())
        self.close("kivi8 against auto", "long", "kivi8-tp2", "auto-tp2", 2 * self.noise())

    def ray_on_one_node(self) -> None:
        self.workers("kivi2-ray", 1)
        self.same("Ray against multiprocessing", "kivi2-ray", "kivi2-tp2")

    def ray_on_two_nodes(self) -> None:
        """NCCL adds up what vLLM's own kernel does on one node: two terms, so in the same order."""
        self.workers("kivi2-nodes", 2)
        self.same("Ray on two nodes against multiprocessing", "kivi2-nodes", "kivi2-tp2")


CHECKS = (
    Comparison.auto,
    Comparison.one_against_two,
    Comparison.against_auto,
    Comparison.ray_on_one_node,
    Comparison.ray_on_two_nodes,
)


def check(folder: Path, only: list[str], seconds: float) -> int:
    errors: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:
        model = save_tiny_llama(Path(name), **MODEL)
        for run in only:
            start = time.perf_counter()
            try:
                reason = attempt(run, model, folder, seconds)
            except Exception as error:  # the next run may still tell something
                reason = f"{type(error).__name__}: {error}"
            if reason:
                errors[run] = reason
            print(f"---- {run}: {time.perf_counter() - start:.0f} s {reason[-2000:]}", flush=True)
    paths = {run: folder / f"{run}.pickle" for run in RUNS}
    found = {run: pickle.loads(path.read_bytes()) for run, path in paths.items() if path.exists()}
    results = Comparison(found)
    for compare in CHECKS:
        try:
            compare(results)
        except KeyError as missing:
            run = missing.args[0]
            results.add(compare.__name__, f"{run}: {errors.get(run, 'not run')}"[:200], "its answers", False)
    kept = {
        run: {key: answer[key] for key in ("capacity", "blocks", "workers", "started")} for run, answer in found.items()
    }
    report = {"runs": kept, "errors": errors, "checks": results.lines}
    (folder / "parallel_check.json").write_text(json.dumps(report, indent=1) + "\n")
    return results.finish()


def main() -> int:
    if sys.argv[1:2] == ["--measure"]:
        name, model, out = sys.argv[2:]
        measure(RUNS[name], Path(model), Path(out))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RUNS), help="default: all runs, %(default)s")
    parser.add_argument("--output", type=Path, help="default: a folder that is not kept")
    parser.add_argument("--timeout", type=float, default=150, help="seconds that a run may take")
    args = parser.parse_args()
    only = args.only.split(",")
    if unknown := set(only) - set(RUNS):
        parser.error(f"no run {', '.join(sorted(unknown))}; there are {', '.join(RUNS)}")
    if args.output is None:
        with tempfile.TemporaryDirectory() as folder:
            return check(Path(folder), only, args.timeout)
    args.output.mkdir(parents=True, exist_ok=True)
    return check(args.output, only, args.timeout)


if __name__ == "__main__":
    sys.exit(main())
