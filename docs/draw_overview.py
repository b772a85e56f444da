"""Draws docs/overview.svg: a token's way through a frozen layer and the experts beside it, and what the parts can be.

Run from anywhere: `python docs/draw_overview.py`.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

PICTURE = Path(__file__).parent / "overview.svg"
WIDTH, HEIGHT = 960, 400
FONT = 'font-family="Helvetica, Arial, sans-serif"'
TEXT, FAINT, LINE = "#14273d", "#51606f", "#51606f"
# Fill and edge of what is frozen, of the router, and of the experts.
FROZEN, ROUTER, EXPERT = ("#e9edf2", "#7d8a99"), ("#fdeecf", "#b9770e"), ("#dcebfa", "#1f5fa8")
# Width of each expert's line in the picture: the weight that the router gives it.
WEIGHTS = (0.6, 0.1, 0.3, 0.0)


def text(x: float, y: float, words: str, size: int = 14, bold: bool = False, anchor: str = "middle", fill: str = TEXT):
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" {FONT} font-size="{size}"{weight} text-anchor="{anchor}" fill="{fill}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, colors: tuple[str, str], title: str, below: str = "") -> str:
    """A box with a title, and a smaller line below it."""
    middle, fill_edge = x + width / 2, f'fill="{colors[0]}" stroke="{colors[1]}" stroke-width="1.5"'
    parts = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" {fill_edge}/>']
    parts.append(text(middle, y + height / 2 + (-3 if below else 5), title, 15, bold=True))
    if below:
        parts.append(text(middle, y + height / 2 + 15, below, 12, fill=FAINT))
    return "\n".join(parts)


def arrow(points: list[tuple[float, float]], width: float = 1.5, color: str = LINE, tip: bool = True) -> str:
    """A line through points, with a tip at its end."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width:g}"{end}/>'


def layer() -> list[str]:
    """The frozen layer, the router and the experts."""
    parts = [text(50, 138, "x", 18, bold=True), text(50, 158, "a token", 12, fill=FAINT)]
    parts += [arrow([(75, 132), (110, 132), (110, 55), (168, 55)])]
    parts += [box(172, 26, 470, 58, FROZEN, "the layer of your model", "W0 x, frozen, in 16, 8 or 4 bits")]
    parts += [arrow([(110, 132), (110, 205), (168, 205)])]
    parts += [box(172, 172, 110, 66, ROUTER, "router", "softmax(Wg x)")]
    for number, weight in enumerate(WEIGHTS):
        y = 118 + 46 * number
        dead = ' stroke-dasharray="4 4"' if not weight else ""
        line = arrow([(284, 205), (330, y + 18), (384, y + 18)], 1 + 6 * weight, ROUTER[1], tip=False)
        parts.append(line.replace("/>", f"{dead}/>"))
        parts.append(text(352, y + 12, f"{weight:.1f}" if weight else "-", 12, fill=FAINT))
        parts.append(box(386, y, 150, 36, EXPERT, f"expert {number + 1}"))
        if weight:
            parts.append(arrow([(538, y + 18), (600, y + 18), (660, 203)], 1 + 6 * weight, EXPERT[1], tip=False))
    parts += ['<circle cx="672" cy="205" r="15" fill="white" stroke="#51606f" stroke-width="1.5"/>']
    parts += [text(672, 211, "+", 20, bold=True), arrow([(644, 55), (672, 55), (672, 187)])]
    parts += [arrow([(689, 205), (740, 205)]), text(760, 211, "y", 18, bold=True)]
    return parts


def sides() -> list[str]:
    """What the parts can be, and what stays as it is."""
    parts = [f'<line x1="14" y1="312" x2="{WIDTH - 14}" y2="312" stroke="#d5dbe2"/>']
    rows = {
        "router": "dense, top-k, with a capacity, or the backbone's own",
        "experts": "low-rank pairs, bottlenecks, vectors, or experts of the backbone",
        "losses": "load balancing, z-loss, balance by sample groups: in the gradient of any training loop",
    }
    for number, (name, words) in enumerate(rows.items()):
        parts.append(text(24, 338 + 23 * number, name, 13, bold=True, anchor="start"))
        parts.append(text(100, 338 + 23 * number, words, 13, anchor="start", fill=FAINT))
    stock = ("peft", "TRL, transformers", "accelerate", "bitsandbytes", "safetensors, the Hub")
    parts.append(text(770, 60, "stock, unchanged", 13, bold=True, anchor="start"))
    parts += [text(770, 84 + 22 * number, name, 13, anchor="start", fill=FAINT) for number, name in enumerate(stock)]
    return parts


def draw() -> str:
    """The picture as text."""
    title = "A token passes the frozen layer and, beside it, the experts that its router chooses"
    tip = (
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto" '
        f'markerUnits="userSpaceOnUse"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    ground = f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="white"/>'
    return "\n".join([head, f"<title>{title}</title>", tip, ground, *layer(), *sides(), "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
