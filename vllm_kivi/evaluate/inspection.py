"""Which layers quantization hurts: `vllm-kivi inspect`.

A text runs through an engine with the model's own cache, and hooks on its attention layers see queries, keys and values
as the cache gets them. Each layer is measured on its own, with exact inputs, under every cache dtype asked for.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from vllm_kivi.evaluate import report
from vllm_kivi.evaluate.layer_errors import LayerInputs, measure, ratios
from vllm_kivi.evaluate.ppl import cut_windows
from vllm_kivi.evaluate.session import (
    Candidate,
    EvalError,
    candidates,
    check_before_vllm,
    engine,
    engine_arguments,
    model_config,
    quiet_vllm,
    read_text,
    tokenizer_of,
)
from vllm_kivi.format import PRESETS, KVFormat
from vllm_kivi.options import KiviOptions

# A layer is suggested for --kv-cache-dtype-skip-layers if its attention outputs are off by more than this share of
# their own size and by more than so many times the median of all layers. Healthy layers of SmolLM2 are off by up to
# 33 % at 2 bits, 3 times their median; layers with the key biases of Qwen2.5, by 33 to 66 %, 5 to 10 times it.
LOST_SHARE = 0.3
STANDS_OUT = 3.0
# Where the median is above it, skipping layers is no help.
MOST_LOST = 0.5
# Of the median magnitude of a head's channels.
OUTLIER = 4.0
SINKS = 4
ROWS = 48


@dataclass(frozen=True)
class Settings:
    """What to inspect; every field but the last three is an option of `vllm-kivi inspect`."""

    model: str
    text: Path
    kv_cache_dtypes: tuple[str, ...] = ("kivi2",)
    window: int = 1024
    windows: int = 2
    dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)
    baseline: str = "auto"
    parallel: int = 1


@dataclass
class _Layer:
    """An attention layer of the engine, and what was summed up of it for each cache dtype."""

    index: str
    module: Any
    formats: dict[str, KVFormat]
    sums: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, label: str, sums: dict[str, Any]) -> None:
        before = self.sums.get(label)
        self.sums[label] = sums if before is None else {name: before[name] + found for name, found in sums.items()}


def _reason_unquantized(layer: Any) -> str | None:
    """Why kivi leaves a layer alone, or refuses it; None if it would be quantized."""
    if layer.attn_type != "decoder":
        return f"{layer.attn_type} attention"
    if layer.sliding_window is not None:
        return "sliding window"
    if layer.kv_sharing_target_layer_name is not None:
        return "shares another layer's cache"
    if layer.has_sink:
        return "learned attention sinks"
    return None


def _layers(llm: Any, config: Any, settings: Settings) -> tuple[list[_Layer], dict[str, str]]:
    """Layers that would be quantized, and why others would not."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers, left = [], {}
    dtype = str(config.dtype).removeprefix("torch.")
    for name, module in llm.llm_engine.vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(module, Attention):
            continue
        if (reason := _reason_unquantized(module)) is not None:
            left[name] = reason
            continue
        formats = {}
        for candidate in _measured(settings):
            options = KiviOptions.from_additional_config(candidate.additional_config(settings.additional_config))
            formats[candidate.label] = options.format(candidate.dtype, module.head_size, module.num_kv_heads, dtype)
        layers.append(_Layer(str(extract_layer_index(name)), module, formats))
    if not layers:
        raise EvalError(f"{settings.model} has no attention layer that kivi quantizes: {left or 'none at all'}")
    return layers, left


def _measured(settings: Settings) -> list[Candidate]:
    """What to quantize under; the baseline is what the engine runs."""
    return [candidate for candidate in candidates(settings) if candidate.label != settings.baseline]


def sink_counts(fmt: KVFormat) -> tuple[int, int]:
    """Numbers of sinks to measure with: the one asked for, and none or SINKS beside it."""
    return fmt.sink_tokens, 0 if fmt.sink_tokens else SINKS


@contextmanager
def captured(layers: Sequence[_Layer], window: int, bar: Any) -> Iterator[None]:
    """Measure what layers get in each step, which must be a whole window. Hooks are gone afterwards."""

    def hook_of(layer: _Layer) -> Any:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            # Rows behind the window are padding.
            query, key, value = (
                given[name].view(len(given[name]), -1, module.head_size)[:window] for name in ("query", "key", "value")
            )
            if len(query) < window:
                raise RuntimeError(f"the engine prefilled {len(query)} tokens at once, not a window of {window}")
            cap = getattr(module.impl, "logits_soft_cap", None) or 0.0
            inputs = LayerInputs(query, key, value, float(module.impl.scale), float(cap))
            for label, fmt in layer.formats.items():
                layer.add(label, measure(fmt, inputs, measured_rows(fmt, window), sink_counts(fmt)))
            bar.update(1)

        return hook

    handles = [layer.module.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measured_rows(fmt: KVFormat, window: int) -> list[int]:
    """Positions that read quantized pages, evenly spread up to the end of the window."""
    first = next(row for row in range(window) if fmt.boundary(row + 1) > max(sink_counts(fmt)))
    count = min(ROWS, window - first)
    return [first + (window - 1 - first) * (i + 1) // count for i in range(count)]


def _check(settings: Settings) -> None:
    check_before_vllm(settings)
    for candidate in candidates(settings):
        if candidate.dtype not in PRESETS and candidate.label != settings.baseline:
            accepted = ", ".join(PRESETS)
            raise EvalError(f"--kv-cache-dtype {candidate.label}: only kivi's own can be inspected: {accepted}")
    if not _measured(settings):
        raise EvalError(f"--kv-cache-dtype: name one of {', '.join(PRESETS)}")
    for candidate in _measured(settings):
        options = KiviOptions.from_additional_config(candidate.additional_config(settings.additional_config))
        fmt = options.format(candidate.dtype, 64, 1, "bfloat16")
        if fmt.boundary(settings.window) <= max(sink_counts(fmt)):
            needed = fmt.residual_length + (max(sink_counts(fmt)) // fmt.group_size + 1) * fmt.group_size
            raise EvalError(f"--window {settings.window} has no quantized token: {candidate.label} needs {needed}")


def run(settings: Settings) -> dict[str, Any]:
    """Run the text once and measure all layers under every cache dtype asked for.

    Returns:
        What was found, ready for json.dumps: "results" has one entry per cache dtype, each with its "layers" (one per
        attention layer, each with its "heads") and "suggestion". Errors are relative, 0 to about 1.

    Raises:
        EvalError: says what to change.
    """
    from tqdm import tqdm

    text = read_text(settings.text)
    _check(settings)
    quiet_vllm()
    config = model_config(settings)
    if settings.window >= config.max_model_len:
        raise EvalError(f"--window {settings.window} must be less than the model's {config.max_model_len} positions")
    tokenizer = tokenizer_of(config)
    tokens = tokenizer.encode(text, add_special_tokens=False)
    windows = cut_windows(tokens, tokenizer.encode(""), settings.window, None)[: settings.windows]
    if not windows:
        raise EvalError(f"{len(tokens)} tokens of {settings.text} do not fill one --window of {settings.window}")
    own = Candidate.parse(settings.baseline)
    arguments = engine_arguments(settings, own, config, settings.window + 1, 1, settings.window + 1)
    with engine(**arguments) as llm:
        from vllm import SamplingParams, TokensPrompt

        layers, left = _layers(llm, config, settings)
        total = len(layers) * len(windows)
        bar = tqdm(total=total, desc="inspecting", unit="layer", file=sys.stderr, disable=None)
        with bar, captured(layers, settings.window, bar):
            for window in windows:
                params = SamplingParams(max_tokens=1, detokenize=False)
                llm.generate([TokensPrompt(prompt_token_ids=list(window))], params, use_tqdm=False)
    results = [_result(candidate.label, layers) for candidate in _measured(settings)]
    return report.header(settings.model, config, settings.additional_config) | {
        "text": settings.text.name,
        "window": settings.window,
        "windows": len(windows),
        "rule": {"output_error_above": LOST_SHARE, "times_the_median_above": STANDS_OUT},
        "layers_not_quantized": left,
        "results": results,
    }


def _rounded(values: Any) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def _outlier_channels(sizes: Any) -> list[dict[str, float]]:
    """Channels far larger than the median, the largest first."""
    found = [{"channel": channel, "ratio": round(ratio, 2)} for channel, ratio in enumerate(sizes.tolist())]
    return sorted((one for one in found if one["ratio"] > OUTLIER), key=lambda one: -one["ratio"])


def _layer_result(layer: _Layer, label: str) -> dict[str, Any]:
    found, fmt = ratios(layer.sums[label]), layer.formats[label]
    asked, other = map(str, sink_counts(fmt))
    heads = [
        {
            "head": head,
            "keys": found["keys"][head].item(),
            "values": found["values"][head].item(),
            "scores": found["scores"][head].item(),
            "outputs": {asked: found["sinks"][0, head].item(), other: found["sinks"][1, head].item()},
            "key_channels": _rounded(found["key_channels"][head]),
            "value_channels": _rounded(found["value_channels"][head]),
            "key_outliers": _outlier_channels(found["key_outliers"][head]),
            "value_outliers": _outlier_channels(found["value_outliers"][head]),
        }
        for head in range(fmt.num_kv_heads)
    ]
    outputs = found["layer_outputs"].tolist()
    return {
        "layer": layer.index,
        "output_error": outputs[0],
        "outputs": {asked: outputs[0], other: outputs[1]},
        "token_bytes": fmt.num_kv_heads * fmt.token_bytes,
        "full_token_bytes": fmt.num_kv_heads * fmt.full_token_bytes,
        "heads": heads,
    }


def suggest(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Layers to leave in full precision, by LOST_SHARE and STANDS_OUT."""
    middle = median(layer["output_error"] for layer in layers)
    return [
        layer["layer"]
        for layer in layers
        if layer["output_error"] > LOST_SHARE and layer["output_error"] > STANDS_OUT * middle
    ]


def _result(label: str, layers: Sequence[_Layer]) -> dict[str, Any]:
    found = [_layer_result(layer, label) for layer in layers]
    fmt = layers[0].formats[label]
    asked, other = map(str, sink_counts(fmt))
    skipped = suggest(found)
    return {
        "kv_cache_dtype": label,
        "bits": fmt.bits_per_element,
        "sink_tokens": fmt.sink_tokens,
        "median_output_error": {sinks: median(layer["outputs"][sinks] for layer in found) for sinks in (asked, other)},
        "suggested_skip_layers": skipped,
        "kv_bytes_per_token": sum(layer["token_bytes"] for layer in found),
        "kv_bytes_per_token_with_suggestion": sum(
            layer["full_token_bytes" if layer["layer"] in skipped else "token_bytes"] for layer in found
        ),
        "layers": found,
    }


def advice(result: dict[str, Any]) -> list[str]:
    """What to do about a cache dtype, in sentences."""
    middle = result["median_output_error"]
    asked = str(result["sink_tokens"])
    other = next(sinks for sinks in middle if sinks != asked)
    lines = []
    if int(other) > int(asked) and middle[other] < 0.9 * middle[asked]:
        lines.append(
            f"The first tokens matter: sink_tokens={other} makes the median error of attention outputs "
            f"{report.percent(middle[other], 1)} instead of {report.percent(middle[asked], 1)}. Set it first, and "
            "inspect again."
        )
    skipped = result["suggested_skip_layers"]
    if skipped:
        errors = {layer["layer"]: layer["output_error"] for layer in result["layers"]}
        off = ", ".join(f"{name} by {report.percent(errors[name])}" for name in skipped)
        lines.append(
            f"Attention outputs are off in layer {off}: more than {report.percent(LOST_SHARE)}, and more than "
            f"{STANDS_OUT:g} times the median of all layers. Leave these in full precision, "
            f"--kv-cache-dtype-skip-layers {' '.join(skipped)} "
            f"(about {result['kv_bytes_per_token_with_suggestion']:,} KV bytes a token instead of "
            f"{result['kv_bytes_per_token']:,}), or choose more bits."
        )
    elif middle[asked] > MOST_LOST:
        lines.append("Attention outputs of most layers are off by more than half: choose more bits.")
    else:
        lines.append("No layer stands out.")
    return lines


def _largest(heads: Sequence[dict[str, Any]], name: str) -> str:
    """How many outlier channels the heads of a layer have, and the largest."""
    ratios_of = [one["ratio"] for head in heads for one in head[name]]
    return f"{len(ratios_of)} ({max(ratios_of):.0f}x)" if ratios_of else "0"


def table(inspected: dict[str, Any]) -> str:
    """The report in Markdown: for each cache dtype a row per layer, then what to do."""
    lines = [
        f"{inspected['model']} on {inspected['text']}: {inspected['windows']} windows of {inspected['window']:,} "
        f"tokens; {inspected['dtype']}, vLLM {inspected['vllm']} on {inspected['device']}.",
    ]
    for result in inspected["results"]:
        asked = str(result["sink_tokens"])
        other = next(sinks for sinks in result["median_output_error"] if sinks != asked)
        rows = []
        for layer in result["layers"]:
            heads = layer["heads"]
            worst = max(heads, key=lambda head: head["outputs"][asked])
            rows.append(
                (
                    layer["layer"],
                    *(report.percent(max(head[name] for head in heads)) for name in ("keys", "values")),
                    f"{max(head['scores'] for head in heads):.2f}",
                    report.percent(layer["outputs"][asked], 1),
                    report.percent(layer["outputs"][other], 1),
                    f"{worst['head']}: {report.percent(worst['outputs'][asked])}",
                    _largest(heads, "key_outliers"),
                    _largest(heads, "value_outliers"),
                    "skip" if layer["layer"] in result["suggested_skip_layers"] else "",
                )
            )
        titles = f"layer,keys,values,scores,outputs,outputs ({other} sinks),worst head,key outliers,value outliers,"
        lines += ["", f"{result['kv_cache_dtype']} ({result['bits']:.2f} bits; {asked} sinks)", ""]
        lines += [*report.markdown(titles, rows), "", *advice(result)]
    lines += [
        "",
        "Each layer on its own, with exact inputs. Keys, values: relative error, of the worst head; keys relative to "
        "how they vary. Scores: standard deviation of what quantization adds to scores that have weight, of the worst "
        "head. Outputs: relative error of attention outputs of all heads, which suggestions rest on. Outliers: "
        f"channels of all heads that are more than {OUTLIER:g} times the median, and the largest.",
    ]
    if inspected["layers_not_quantized"]:
        left = ", ".join(f"{name} ({reason})" for name, reason in inspected["layers_not_quantized"].items())
        lines += ["", f"Not quantized by kivi: {left}."]
    return "\n".join(lines)
