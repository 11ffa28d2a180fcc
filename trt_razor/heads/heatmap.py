"""A picture of a head map: every KV head's scores, the chosen ones marked."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_razor.errors import MissingExtra, RazorError, UsageError
from trt_razor.files import write_bytes_atomic
from trt_razor.headmap import HeadMap
from trt_razor.heads.selection import MEASURED, METHODS, Choice, Heads, SelectionOptions, select

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OWN = "#e8590c"  # chosen by the score this panel shows
OTHER = "#74c0fc"  # chosen by another score
BARS_W = 0.9
"""Width of the bars by layer, in inches."""

TITLES = {
    "echo": "echo: attention to the same token earlier\n(colour by square root)",
    "induction": "induction: attention to what followed it\n(colour by square root)",
    "effect": "effect: loss an answer gains when local\n(nats a token)",
    "gradient": "gradient of that loss by the head's gate\n(nats a token)",
    "greedy": "greedy: N for the first of N chosen heads,\nbelow 1: not chosen",
    "scope": "scope in tokens (log scale)",
}


def save_heatmap(head_map: HeadMap, path: Path) -> None:
    """Write the heat map as a PNG, atomically.

    Layers run down, KV heads across; one panel a score. A frame marks every chosen head: orange in
    the panel of the score it was chosen by, blue where another score chose it. Bars at the right
    count the chosen heads of each layer.

    Raises:
        UsageError: the name does not end in .png.
        MissingExtra: matplotlib is not installed.
        RazorError: the file cannot be written.
    """
    check_name(path)
    figure = draw_heatmap(head_map)
    data = io.BytesIO()
    # No software version in the file: the same map gives the same bytes.
    figure.savefig(data, format="png", dpi=120, metadata={"Software": None})
    write_bytes_atomic(path, data.getvalue())


def check_name(path: Path) -> None:
    """Raises UsageError unless the file's name ends in .png: ask before minutes of scoring."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"{path}: the heat map is a PNG file; expected a name ending in .png")


def draw_heatmap(head_map: HeadMap) -> Figure:
    """The figure itself, for callers that place it elsewhere. Nothing global is touched."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib", "heads", "the heat map") from None

    layers, heads = head_map.num_layers, head_map.num_kv_heads
    panels = _panels(head_map)
    cell_w = float(np.clip(7.0 / heads, 0.17, 0.55))
    cell_h = float(np.clip(11.0 / layers, 0.15, 0.30))
    panel_w, panel_h = max(2.6, heads * cell_w), max(2.4, layers * cell_h)
    figure = Figure(
        figsize=(len(panels) * (panel_w + 1.5) + BARS_W + 0.9, panel_h + 1.9), layout="constrained"
    )
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr, call-arg]
    figure.suptitle(_title(head_map), fontsize=11)
    widths = [*[panel_w + 1.1] * len(panels), BARS_W]
    axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    for ax, (name, table, own) in zip(axes, panels, strict=False):
        _draw_panel(figure, ax, panel_h, head_map.retrieval_heads, name, table, own)
    _draw_depth(axes[-1], head_map.retrieval_heads, heads)
    _legend(figure, head_map, panels)
    return figure


def chosen_by(head_map: HeadMap) -> Choice | None:
    """Which score chose which head, repeated from the map's scores and settings.

    None if the map does not come from scores that were measured here, or was edited since.
    """
    needed = {head_map.method} if head_map.method in MEASURED else {"echo", "induction"}
    if head_map.method not in METHODS or not needed <= set(head_map.scores):
        return None
    fields = SelectionOptions.__dataclass_fields__
    try:
        known: dict[str, Any] = {k: v for k, v in head_map.options.items() if k in fields}
        options = SelectionOptions(**{**known, "method": head_map.method})
        choice = select({k: np.array(v) for k, v in head_map.scores.items()}, options)
    except (RazorError, TypeError):
        return None
    return choice if choice.heads == head_map.retrieval_heads else None


Panel = tuple[str, np.ndarray, Heads]


def _panels(head_map: HeadMap) -> list[Panel]:
    """(score, [layers, KV heads] values, heads chosen by that score) for each panel."""
    if not head_map.scores:
        table = np.zeros((head_map.num_layers, head_map.num_kv_heads))
        for layer, row in enumerate(head_map.retrieval_heads):
            table[layer, list(row)] = 1
        return [("chosen", table, head_map.retrieval_heads)]
    choice = chosen_by(head_map)
    own = {"echo": choice.by_echo, "induction": choice.by_induction} if choice else {}
    order = [n for n in TITLES if n in head_map.scores]
    order += sorted(set(head_map.scores) - set(TITLES))
    return [
        (n, np.array(head_map.scores[n], dtype=np.float64), own.get(n, head_map.retrieval_heads))
        for n in order
    ]


def _draw_panel(
    figure: Figure,
    ax: Axes,
    panel_h: float,
    chosen: Heads,
    name: str,
    table: np.ndarray,
    own: Heads,
) -> None:
    from matplotlib.colors import LogNorm, Normalize, PowerNorm
    from matplotlib.patches import Rectangle

    layers, heads = table.shape
    top = float(table.max())
    if name == "scope" and table.min() > 0 and top > table.min():
        norm: Normalize = LogNorm(float(table.min()), top)
    elif name in ("echo", "induction") and top > 0:
        norm = PowerNorm(0.5, 0.0, top)  # one strong head would leave the others white
    else:
        norm = Normalize(min(0.0, float(table.min())), top if top > 0 else 1.0)
    image = ax.imshow(table, cmap="gray_r", norm=norm, aspect="auto", interpolation="nearest")
    # A bar as tall as its panel: matplotlib keeps the ratio, so it must follow the panel's height.
    bar = figure.colorbar(image, ax=ax, fraction=0.05, pad=0.02, aspect=panel_h / 0.13)
    bar.ax.tick_params(labelsize=7)
    ax.set_title(TITLES.get(name, name), fontsize=9)
    ax.set_xlabel("KV head", fontsize=8)
    ax.set_ylabel("layer", fontsize=8)
    ax.set_xticks(range(0, heads, _step(heads, 16)))
    ax.set_yticks(range(0, layers, _step(layers, 40)))
    ax.tick_params(labelsize=7)
    ax.set_xticks(np.arange(-0.5, heads), minor=True)
    ax.set_yticks(np.arange(-0.5, layers), minor=True)
    ax.grid(which="minor", color="#dddddd", linewidth=0.4)
    ax.tick_params(which="minor", length=0)
    for layer, row in enumerate(chosen):
        for head in row:
            mine = head in own[layer]
            frame = Rectangle(
                (head - 0.42, layer - 0.42),
                0.84,
                0.84,
                fill=False,
                edgecolor=OWN if mine else OTHER,
                linewidth=1.8 if mine else 1.2,
            )
            ax.add_patch(frame)


def _draw_depth(ax: Axes, chosen: Heads, heads: int) -> None:
    """Chosen heads of each layer, beside the panels and on their scale."""
    layers = len(chosen)
    ax.barh(range(layers), [len(row) for row in chosen], height=0.8, color=OWN)
    ax.set_ylim(layers - 0.5, -0.5)
    ax.set_xlim(0, heads)
    ax.set_xticks(range(0, heads + 1, _step(heads, 4)))
    ax.set_yticks(range(0, layers, _step(layers, 40)))
    ax.tick_params(labelsize=7)
    ax.set_title("by layer", fontsize=9)
    ax.set_xlabel("chosen", fontsize=8)


def _legend(figure: Figure, head_map: HeadMap, panels: list[Panel]) -> None:
    from matplotlib.patches import Patch

    def patch(color: str, text: str) -> Patch:
        return Patch(facecolor="none", edgecolor=color, linewidth=1.8, label=text)

    if len(panels) == 1 or chosen_by(head_map) is None:
        handles = [patch(OWN, "retrieval head")]
    else:
        handles = [
            patch(OWN, "retrieval head, chosen by this score"),
            patch(OTHER, "retrieval head, chosen by another score"),
        ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False
    )


def _title(head_map: HeadMap) -> str:
    total = head_map.num_layers * head_map.num_kv_heads
    lines = [
        f"{head_map.model}: {head_map.num_retrieval} of {total} KV heads retrieve "
        f"({head_map.share:.1%})"
    ]
    options = head_map.options
    origin = options.get("format") if head_map.method == "import" else None
    parts = [f"method {head_map.method}" + (f" of {origin}" if isinstance(origin, str) else "")]
    for key, text in (
        ("induction_share", "induction {:.0%}"),
        ("echo_share", "echo {:.0%}"),
        ("min_echo", "at least {} echo heads"),
        ("combined_share", "share {:.0%}"),
        ("effect_share", "share {:.0%}"),
        ("share", "share {:.0%}"),
        ("threshold", "score at least {:g}"),
        ("window", "window {} tokens"),
    ):
        if isinstance(options.get(key), (int, float)):
            parts.append(text.format(options[key]))
    lines.append(", ".join(parts))
    return "\n".join(lines)


def _step(count: int, labels: int) -> int:
    """Distance of tick labels so that at most ``labels`` are drawn."""
    return next((s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50) if count <= s * labels), count)
