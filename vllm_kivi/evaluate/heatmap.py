"""Pictures of `vllm-kivi eval passkey`, `needle` and `inspect`; the only part that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_kivi.evaluate.session import EvalError


def _figure(path: Path, width: float, height: float) -> Any:
    """An empty figure that can be saved anywhere.

    Raises:
        EvalError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EvalError(f"no heat map: {path} needs matplotlib: pip install 'vllm-kivi[bench]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw(measured: dict[str, Any], path: Path) -> None:
    """A heat map of each cache side by side: depth over length, the share of right answers as colour.

    Raises:
        EvalError: matplotlib is missing.
    """
    lengths, depths, results = measured["lengths"], measured["depths"], measured["results"]
    width, height = 1.6 + 0.75 * len(lengths), 1.6 + 0.35 * len(depths)
    figure = _figure(path, width * len(results) + 1, max(height, 3))
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, result in zip(panels, results, strict=True):
        cells = {(cell["length"], cell["depth"]): cell["right"] / cell["prompts"] for cell in result["cells"]}
        shares = [[cells[length, depth] for length in lengths] for depth in depths]
        image = axes.imshow(shares, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(shares):
            for x, share in enumerate(row):
                colour = "black" if share > 0.6 else "white"
                axes.text(x, y, f"{100 * share:.0f}", ha="center", va="center", fontsize="small", color=colour)
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        axes.set_title(f"{result['kv_cache_dtype']} ({result['bits']:.2f} bits)", fontsize="medium")
        axes.set_xlabel("prompt, tokens")
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(image, ax=list(panels), label="right answers", format=lambda share, _: f"{100 * share:.0f} %")
    figure.suptitle(f"{measured['measure']}, {measured['model']}", fontsize="medium")
    figure.savefig(path, dpi=130)


def draw_layers(inspected: dict[str, Any], path: Path) -> None:
    """A heat map of each cache dtype side by side: layers over KV heads, the error of attention outputs as colour.

    Raises:
        EvalError: matplotlib is missing.
    """
    results = inspected["results"]
    grids = [
        [[head["outputs"][str(result["sink_tokens"])] for head in layer["heads"]] for layer in result["layers"]]
        for result in results
    ]
    rows, columns = len(grids[0]), len(grids[0][0])
    figure = _figure(path, (2 + 0.3 * columns) * len(results) + 1, max(3, 1.5 + 0.2 * rows))
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    largest = max(max(row) for grid in grids for row in grid)
    for axes, result, grid in zip(panels, results, grids, strict=True):
        image = axes.imshow(grid, cmap="magma", vmin=0, vmax=max(largest, 1e-6), aspect="auto")
        names = [
            f"{layer['layer']} *" if layer["layer"] in result["suggested_skip_layers"] else layer["layer"]
            for layer in result["layers"]
        ]
        axes.set_yticks(range(rows), names, fontsize="x-small")
        axes.set_xticks(range(columns), range(columns), fontsize="x-small")
        axes.set_title(f"{result['kv_cache_dtype']} ({result['bits']:.2f} bits)", fontsize="small")
        axes.set_xlabel("KV head")
        axes.tick_params(labelleft=True)
    panels[0].set_ylabel("layer (*: suggested to skip)")
    figure.colorbar(image, ax=list(panels), label="error of attention outputs", format=lambda x, _: f"{100 * x:.0f} %")
    figure.suptitle(f"inspect, {inspected['model']}", fontsize="medium")
    figure.savefig(path, dpi=130)
