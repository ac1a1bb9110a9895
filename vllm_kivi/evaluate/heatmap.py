"""The picture of `vllm-kivi eval passkey` and `needle`; the only part that needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_kivi.evaluate.session import EvalError


def draw(measured: dict[str, Any], path: Path) -> None:
    """A heat map of each cache side by side: depth over length, the share of right answers as colour.

    Raises:
        EvalError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise EvalError(f"no heat map: {path} needs matplotlib: pip install 'vllm-kivi[bench]'") from None
    lengths, depths, results = measured["lengths"], measured["depths"], measured["results"]
    width, height = 1.6 + 0.75 * len(lengths), 1.6 + 0.35 * len(depths)
    figure = Figure(figsize=(width * len(results) + 1, max(height, 3)), layout="constrained")
    FigureCanvasAgg(figure)
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
