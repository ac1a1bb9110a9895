"""What fits: `vllm-kivi plan` counts a model's KV cache from its config.json, without starting an engine.

model.py reads the configuration, pages.py counts pages; here is the report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_kivi import __version__
from vllm_kivi.evaluate.report import markdown
from vllm_kivi.evaluate.session import Candidate, EvalError
from vllm_kivi.format import PRESETS
from vllm_kivi.plan.model import Shapes, max_positions, read_config, read_shapes, weights_bytes
from vllm_kivi.plan.pages import Pool, check_shapes, pool
from vllm_kivi.plan.settings import BASELINE, Settings

__all__ = ["Settings", "draw", "run", "table"]

GIB = 1 << 30
LENGTHS = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


def candidates(settings: Settings) -> list[Candidate]:
    """What to plan for, the model's own cache first: all there is if none is named."""
    named = settings.kv_cache_dtypes or ("fp8", *PRESETS)
    return [Candidate.parse(text) for text in dict.fromkeys((BASELINE, *named))]


def _refuse(shapes: Shapes, presets: Sequence[str]) -> None:
    """Raises ValueError for a model whose cache is not what is counted here, or that the engine would refuse."""
    preset = next(iter(presets), next(iter(PRESETS)))
    if presets or shapes.mla or shapes.encoder_decoder:
        check_shapes(shapes, preset)
    if presets and shapes.refused:
        raise EvalError(f"kivi: --kv-cache-dtype {presets[0]} does not support {shapes.refused}; use auto or fp8")


def _notes(shapes: Shapes, settings: Settings, config: Any, memory: dict[str, Any]) -> list[str]:
    """What was assumed, in sentences."""
    gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
    notes = [
        f"{settings.reserve_gib:g} GiB for activations, CUDA graphs and CUDA itself is an assumption (--reserve-gib): "
        "vLLM measures it at start, and it grows with --max-num-batched-tokens and the vocabulary.",
    ]
    if gpus > 1:
        stage = ", of the pipeline stage with most layers" if settings.pipeline_parallel_size > 1 else ""
        notes.append(f"Bytes are of one GPU of {gpus}{stage}; weights are taken to be split evenly.")
    positions = max_positions(config)
    if settings.context > positions:
        notes.append(
            f"The model has {positions:,.0f} positions: vLLM refuses the --max-model-len that requests of "
            f"{settings.context:,} tokens need (--context)."
        )
    if "parameters" in memory["weights_from"] and getattr(config, "quantization_config", None):
        notes.append("The model has quantized weights, which are smaller than counted: pass --weights-gib.")
    if shapes.sliding:
        notes.append(
            f"{len(shapes.sliding)} layers have a sliding window of {shapes.window:,} tokens and stay in full "
            f"precision with kivi. As vLLM does, {settings.in_flight_tokens:,} tokens in flight are counted with "
            "the window (--max-num-batched-tokens)."
        )
    if shapes.others:
        kinds = ", ".join(dict.fromkeys(shapes.others))
        notes.append(
            f"{len(shapes.others)} layers hold no tokens ({kinds}). What they keep instead is not counted, nor what "
            "vLLM adds to pages to make them equal to it: less fits than stands here."
        )
    return notes


def run(settings: Settings) -> dict[str, Any]:
    """The whole report, ready for JSON.

    Raises:
        ValueError: the model, an option or the memory does not do; says what to change.
    """
    chosen = candidates(settings)
    config, folder = read_config(settings.model)
    shapes = read_shapes(config, settings.dtype)
    _refuse(shapes, [candidate.dtype for candidate in chosen if candidate.dtype in PRESETS])
    if shapes.num_layers < settings.pipeline_parallel_size:
        raise EvalError(f"--pipeline-parallel-size {settings.pipeline_parallel_size}: {shapes.num_layers} layers only")
    size, num_heads = settings.tensor_parallel_size, config.get_text_config().num_attention_heads
    if num_heads % size:
        raise EvalError(
            f"--tensor-parallel-size {size} does not divide {num_heads} attention heads, which vLLM refuses"
        )
    if shapes.num_kv_heads % size and size % shapes.num_kv_heads:
        raise EvalError(
            f"--tensor-parallel-size {size} neither divides {shapes.num_kv_heads} KV heads nor is a multiple of them, "
            "which vLLM refuses"
        )
    pools = [pool(shapes, candidate, settings) for candidate in chosen]
    if settings.weights_gib is None:
        weights, source = weights_bytes(config, folder, shapes.dtype)
    else:
        weights, source = int(settings.weights_gib * GIB), "--weights-gib"
    gpus = settings.tensor_parallel_size * settings.pipeline_parallel_size
    usable = settings.gpu_memory * settings.gpu_memory_utilization * GIB
    available = int(usable - weights / gpus - settings.reserve_gib * GIB)
    if available <= 0:
        raise EvalError(
            f"no memory is left for the cache: {weights / gpus / GIB:.2f} GiB of weights a GPU and "
            f"{settings.reserve_gib:g} GiB of --reserve-gib in {usable / GIB:.2f} GiB; raise --gpu-memory or "
            "--tensor-parallel-size"
        )
    name = _name(settings.model)
    memory = {"weights_bytes": weights, "weights_from": source, "available_bytes": available}
    return {
        "measure": "plan",
        "model": name,
        "vllm_kivi": __version__,
        "settings": asdict(settings) | {"model": name, "kv_cache_dtypes": [candidate.label for candidate in chosen]},
        "shapes": asdict(shapes),
        "memory": memory,
        "notes": _notes(shapes, settings, config, memory),
        "lengths": list(LENGTHS),
        "results": [
            _result(candidate.label, own, pools[0], available, settings.context)
            for candidate, own in zip(chosen, pools, strict=True)
        ],
    }


def _name(model: str) -> str:
    """What a report calls the model: no path of this machine."""
    path = Path(model)
    if path.name == "config.json":
        path = path.parent
    return path.resolve().name if path.exists() else model


def _result(label: str, own: Pool, baseline: Pool, available: int, context: int) -> dict[str, Any]:
    return {
        "kv_cache_dtype": label,
        "bits": own.bits,
        "bytes_per_token": own.token_bytes,
        "block_bytes": own.block_bytes,
        "num_blocks": available // own.block_bytes,
        "request_blocks": own.blocks(context),
        "request_bytes": own.request_bytes(context),
        "requests": own.requests(available, context),
        "capacity_tokens": own.capacity(available, context),
        "compression": baseline.request_bytes(context) / own.request_bytes(context),
        "compression_by_length": [baseline.request_bytes(n) / own.request_bytes(n) for n in LENGTHS],
    }


def table(report: dict[str, Any]) -> str:
    """The report as text."""
    settings, shapes, memory = report["settings"], report["shapes"], report["memory"]
    layers = " and ".join(f"{len(shapes[name])} {name}" for name in ("full", "sliding") if shapes[name])
    gpus = settings["tensor_parallel_size"] * settings["pipeline_parallel_size"]
    context, results = settings["context"], report["results"]
    lines = [
        f"{report['model']}: {layers} attention layers, {shapes['num_kv_heads']} KV heads of "
        f"{shapes['head_dim']}, {shapes['dtype']}",
        f"{gpus} x {settings['gpu_memory']:g} GiB x {settings['gpu_memory_utilization']:g}, less weights of "
        f"{memory['weights_bytes'] / GIB:.2f} GiB ({memory['weights_from']}) and {settings['reserve_gib']:g} GiB on "
        f"each GPU: {memory['available_bytes'] / GIB:.2f} GiB of each for the KV cache",
        "",
        *markdown(
            f"kv-cache-dtype,bits,bytes a token,MiB a request of {context} tokens,such requests,capacity in tokens,"
            "times smaller than auto",
            [
                (
                    result["kv_cache_dtype"],
                    f"{result['bits']:.2f}",
                    f"{result['bytes_per_token']:,.0f}",
                    f"{result['request_bytes'] / (1 << 20):,.1f}",
                    f"{result['requests']:,}",
                    f"{result['capacity_tokens']:,}",
                    f"{result['compression']:.2f}",
                )
                for result in results
            ],
        ),
        "",
        "Times smaller than auto, by tokens of a request (scales, zeros, sinks and window included):",
        "",
        *markdown(
            ",".join(("kv-cache-dtype", *map(str, report["lengths"]))),
            [
                (result["kv_cache_dtype"], *(f"{ratio:.2f}" for ratio in result["compression_by_length"]))
                for result in results
            ],
        ),
        "",
        *report["notes"],
    ]
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Compression over the length of a request, a line for each cache.

    Raises:
        EvalError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EvalError(f"no plot: {path} needs matplotlib: pip install 'vllm-kivi[bench]'") from None
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for result in report["results"]:
        label = f"{result['kv_cache_dtype']} ({result['bits']:.2f} bits)"
        axes.plot(report["lengths"], result["compression_by_length"], marker="o", markersize=3, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(report["lengths"], [f"{length:,}" for length in report["lengths"]], fontsize="small")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens of a request")
    axes.set_ylabel("times smaller than auto")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    axes.set_title(f"KV cache of {report['model']}", fontsize="medium")
    figure.savefig(path, dpi=130)
