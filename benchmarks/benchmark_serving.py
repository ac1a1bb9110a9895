"""What do clients of a server see with each KV cache dtype: time to the first token, between tokens, and throughput?

Takes the flags of vLLM's own benchmark of that name, and --kv-cache-dtype and --request-rate may list several: each
dtype gets a server of its own (vLLM's OpenAI server), each rate a line of the table, which also goes to
benchmarks/results/<device>.md. Requests arrive as a Poisson process with the same gaps for every dtype; they are sent
and timed by vLLM's own `vllm bench serve`. Prompts are random tokens. Flags it does not know go to the server.

    python benchmarks/benchmark_serving.py --kv-cache-dtype auto kivi2 --request-rate 1 2 4 --num-prompts 64

Without --model: Llama-3.1-8B's shapes with dummy weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import llama
import numpy as np
import torch
from report import Column, Section
from vllm import __version__ as vllm_version
from vllm.benchmarks.datasets import SampleRequest
from vllm.benchmarks.serve import TaskType, benchmark
from vllm.platforms import current_platform

SERVED_NAME = "model"
START_TIMEOUT = 400  # seconds
COLUMNS = (
    Column("kv_cache_dtype", "kv-cache-dtype"),
    Column("capacity", "KV capacity, tokens", ","),
    Column("rate", "requests/s sent", "g"),
    Column("completed", "completed"),
    Column("ttft_p50", "TTFT p50, ms", ",.0f"),
    Column("ttft_p99", "p99", ",.0f"),
    Column("tpot_p50", "TPOT p50, ms", ".1f"),
    Column("tpot_p99", "p99", ".1f"),
    Column("itl_p50", "ITL p50, ms", ".1f"),
    Column("itl_p99", "p99", ".1f"),
    Column("throughput", "output tokens/s", ",.0f"),
    Column("preempted", "preemptions"),
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()


@contextmanager
def server(flags: Sequence[str], log: Path) -> Iterator[str]:
    """A server and its address; what it printed is shown only if it does not start.

    Raises:
        SystemExit: it ended, or took more than START_TIMEOUT.
    """
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host=127.0.0.1", f"--port={port}"]
    command += [f"--served-model-name={SERVED_NAME}", "--disable-uvicorn-access-log", *flags]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                get(f"{url}/health")
                break
            except OSError:
                if process.poll() is not None or time.monotonic() > deadline:
                    print(log.read_text()[-6000:], file=sys.stderr)
                    raise SystemExit(f"the server did not start: {' '.join(command)}") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def metric(url: str, name: str) -> float:
    """The sum of a counter over the server's engines."""
    values = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", get(f"{url}/metrics"), re.MULTILINE)
    return sum(map(float, values))


def capacity(url: str) -> int | None:
    """Tokens that fit, as the server's log has them."""
    found = re.search(r'kv_cache_size_tokens="(\d+)"', get(f"{url}/metrics"))
    return int(found[1]) if found else None


def requests(args: argparse.Namespace, vocabulary: int, seed: int) -> list[SampleRequest]:
    tokens = torch.randint(
        vocabulary, (args.num_prompts, args.random_input_len), generator=torch.Generator().manual_seed(seed)
    )
    return [
        SampleRequest(prompt=row, prompt_len=args.random_input_len, expected_output_len=args.random_output_len)
        for row in tokens.tolist()
    ]


def measure(url: str, args: argparse.Namespace, rate: float, vocabulary: int, seed: int) -> dict[str, Any]:
    """One rate: a row of the table."""
    np.random.seed(seed)  # vLLM draws the gaps between arrivals from numpy's global generator
    preempted = metric(url, "vllm:num_preemptions_total")
    with redirect_stdout(sys.stderr):
        found = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION,
                endpoint_type="vllm",
                api_url=f"{url}/v1/completions",
                base_url=url,
                model_id=SERVED_NAME,
                model_name=SERVED_NAME,
                tokenizer=None,
                input_requests=requests(args, vocabulary, seed),
                logprobs=None,
                request_rate=rate,
                burstiness=1.0,
                disable_tqdm=True,
                num_warmups=0,
                profile=False,
                selected_percentile_metrics=[],
                selected_percentiles=[],
                ignore_eos=True,
                goodput_config_dict={},
                max_concurrency=args.max_concurrency,
                lora_modules=None,
                extra_headers=None,
                extra_body={"temperature": 0.0},
            )
        )
    # Without a tokenizer vLLM leaves the percentiles out, but not the figures that they are of.
    answered = [i for i, count in enumerate(found["output_lens"]) if count]
    ttft = [found["ttfts"][i] for i in answered]
    tpot = [
        (found["latencies"][i] - found["ttfts"][i]) / (found["output_lens"][i] - 1)
        for i in answered
        if found["output_lens"][i] > 1
    ]
    itl = [gap for i in answered for gap in found["itls"][i]]
    row = {"rate": rate, "completed": found["completed"], "throughput": found["output_throughput"]}
    for name, values in (("ttft", ttft), ("tpot", tpot), ("itl", itl)):
        for p in (50, 99):
            row[f"{name}_p{p}"] = float(np.percentile(values, p)) * 1e3 if values else None
    row["preempted"] = int(metric(url, "vllm:num_preemptions_total") - preempted)
    return row


def vocabulary_of(model: str | None) -> int:
    if model is None:
        return int(llama.CONFIG["vocab_size"])
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="default: Llama-3.1-8B's shapes, dummy weights")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto", "kivi2"])
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--request-rate", type=float, nargs="+", default=[1, 2, 4], help="a second; inf: all at once")
    parser.add_argument("--max-concurrency", type=int, help="default: no limit")
    parser.add_argument("--random-input-len", type=int, default=8192)
    parser.add_argument("--random-output-len", type=int, default=128)
    parser.add_argument("--max-model-len", type=int, help="default: a request, rounded up to a multiple of 128 tokens")
    parser.add_argument("--num-layers", type=int, default=32, help="of the default model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--append", action="store_true", help="keep the table's lines of other cache dtypes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    args, server_flags = parser.parse_known_args()
    length = args.random_input_len + args.random_output_len
    max_model_len = args.max_model_len or -(-length // 128) * 128
    vocabulary = vocabulary_of(args.model)
    sizes = f"{args.num_prompts} requests of {args.random_input_len:,} tokens in, {args.random_output_len:,} out"
    limit = f"at most {args.max_concurrency} at once, " if args.max_concurrency else ""
    flags = f" Server flags: {' '.join(server_flags)}." if server_flags else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, model_flags = llama.engine_flags(args.model, args.num_layers, folder)
        section = Section(
            f"Serving, {sizes}",
            f"{model}; Poisson arrivals, {limit}seed {args.seed}, max_model_len {max_model_len:,}. vLLM "
            f"{vllm_version}, torch {torch.__version__}.{flags} Made by benchmarks/benchmark_serving.py.",
            COLUMNS,
            {
                "kind": "lines",
                "by": "kv_cache_dtype",
                "x": "rate",
                "x_label": "requests/s sent",
                "y_label": "ms between tokens of a request (TPOT)",
                "series": {"p50": "tpot_p50", "p99": "tpot_p99"},
            },
        )
        for dtype in args.kv_cache_dtype:
            own = [f"--kv-cache-dtype={dtype}", f"--max-model-len={max_model_len}", *model_flags, *server_flags]
            with server(own, folder / f"{dtype}.log") as url:
                for index, rate in enumerate(args.request_rate):
                    row = measure(url, args, rate, vocabulary, args.seed + index)
                    section.add({"kv_cache_dtype": dtype, "capacity": capacity(url), **row})
    device = current_platform.get_device_name() if current_platform.is_cuda() else "CPU"
    section.write(device, args.output, "kv_cache_dtype" if args.append else None)


if __name__ == "__main__":
    main()
