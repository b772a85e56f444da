"""The look of a report's page, light and dark, narrow and wide."""

from __future__ import annotations

# Cold colors are below the even share, warm ones above; both ends can be told apart without seeing red and green.
LIGHT = ["#2166ac", "#5a9bcb", "#9dc8e2", "#d3e5f0", "#efefec", "#fbdfc0", "#f5b678", "#e08432", "#b05507"]
DARK = ["#7cc0ff", "#4f93cf", "#33658f", "#2b4459", "#30343b", "#5b4630", "#8f6130", "#cf8a3a", "#ffb866"]
# One of each expert, again after ten.
EXPERTS = [
    "#3b6fd4",
    "#d9822b",
    "#2f9e6e",
    "#b8487f",
    "#8a63c9",
    "#a67c1a",
    "#2796b0",
    "#cf5540",
    "#6b8e23",
    "#7a7f8a",
]


def _colors(name: str, colors: list[str]) -> str:
    return "".join(f"--{name}{number}:{color};" for number, color in enumerate(colors))


STYLE = f"""
:root {{ color-scheme: light dark; --bg:#f6f6f3; --card:#ffffff; --fg:#1b1f24; --muted:#59616b; --line:#dfe2e6;
  --s0:#2f5bc4; --s1:#c2620c; --s2:#1f7f5c; --good:#1f7f5c; --note:#2f5bc4; --act:#b3410a; --none:#c9cdd2;
  {_colors("c", LIGHT)} {_colors("e", EXPERTS)} }}
@media (prefers-color-scheme: dark) {{ :root {{ --bg:#121418; --card:#1b1e24; --fg:#e9ebee; --muted:#a2abb6;
  --line:#30353d; --s0:#8fb0ff; --s1:#ffab5e; --s2:#66d3a6; --good:#66d3a6; --note:#8fb0ff; --act:#ff9d66;
  --none:#4a4f57; {_colors("c", DARK)} }} }}
"""

STYLE += """
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--fg); line-height: 1.5;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 16px 64px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 44px 0 6px; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 6px 0; max-width: 74ch; overflow-wrap: anywhere; }
code { font-size: .92em; overflow-wrap: anywhere; }
.muted, figcaption, th, .legend, summary { color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(130px, 1fr)); gap: 10px; margin: 20px 0 0; }
.tile, figure, .advice { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 10px 14px; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.tile span { color: var(--muted); font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 320px), 1fr)); gap: 12px;
  margin-top: 12px; align-items: start; }
.advice { padding: 12px 16px; border-left: 4px solid var(--tone); }
.advice .tone { color: var(--tone); font-size: .8rem; font-weight: 600; }
.advice p { font-size: .93rem; }
.act { --tone: var(--act); } .note { --tone: var(--note); } .good { --tone: var(--good); }
.figures { display: flex; flex-wrap: wrap; gap: 12px; margin-top: 12px; align-items: flex-start; }
.figures.two > figure { flex: 1 1 340px; }
figure { margin: 0; padding: 12px 14px; min-width: 0; max-width: 100%; }
figcaption { font-size: .87rem; margin: 2px 0 8px; max-width: 60ch; }
.scroll { overflow-x: auto; max-width: 100%; }
svg { display: block; }
svg.wide { width: 100%; max-width: 540px; height: auto; }
svg text { fill: var(--muted); font: 11.5px system-ui, sans-serif; font-variant-numeric: tabular-nums; }
svg.wide text { font-size: 13px; }
.rule { stroke: var(--line); } .line { fill: none; stroke-width: 2; } .band { opacity: .16; stroke: none; }
.line.s0 { stroke: var(--s0); } .line.s1 { stroke: var(--s1); stroke-dasharray: 6 4; }
.line.s2 { stroke: var(--s2); stroke-dasharray: 2 3; }
.dot.s0, .band.s0 { fill: var(--s0); } .dot.s1, .band.s1 { fill: var(--s1); } .dot.s2, .band.s2 { fill: var(--s2); }
.cell { shape-rendering: crispEdges; } .cn { fill: none; stroke: var(--none); stroke-dasharray: 2 2; }
.legend { display: flex; flex-wrap: wrap; align-items: center; gap: 3px 10px; font-size: .85rem; margin: 8px 0 0; }
.swatches { display: inline-flex; } .swatches i { width: 18px; height: 12px; }
.key { display: inline-flex; align-items: center; gap: 5px; }
.key i { width: 22px; height: 0; border-top: 3px solid var(--s0); }
.key i.s1 { border-top: 3px dashed var(--s1); } .key i.s2 { border-top: 3px dotted var(--s2); }
details { margin-top: 8px; font-size: .87rem; } summary { cursor: pointer; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; margin-top: 6px; }
th, td { text-align: right; padding: 2px 8px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { font-weight: 500; }
.sentence { width: 100%; }
.sentence + .sentence { margin-top: 12px; }
.tokens { line-height: 2.15; overflow-wrap: anywhere; margin: 2px 0 10px; max-width: none; }
.tokens span { padding: 2px 1px 2px 2px; border-radius: 4px; white-space: pre-wrap;
  background: color-mix(in srgb, var(--e) calc(var(--w) * 62%), transparent);
  box-shadow: inset 0 -2px 0 var(--e); margin-right: 2px; }
.tokens sub { font-size: .64em; opacity: .85; padding-left: 2px; font-variant-numeric: tabular-nums; }
dl { display: grid; grid-template-columns: minmax(110px, auto) 1fr; gap: 4px 16px; font-size: .92rem; }
dt { font-weight: 600; } dd { margin: 0; max-width: 74ch; }
@media (max-width: 560px) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; } }
@media print { body { background: #fff; } figure, .advice { break-inside: avoid; } }
"""
STYLE += "".join(f".c{n} {{ fill: var(--c{n}); background: var(--c{n}); }} " for n in range(len(LIGHT)))
