"""The page of a report: one HTML file without scripts, which loads nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .figures import (
    entropy_figure,
    group_figures,
    history_figures,
    importance_figures,
    load_figures,
    relative_legend,
    similarity_figures,
)
from .measures import effective_experts, known_mean
from .report import RoutingReport
from .sentences import Sentence
from .style import EXPERTS, STYLE

TONES = {"act": "to do", "note": "to know", "good": "good"}
# Nothing is fetched and nothing runs, whatever a text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
MOST_FIGURES = 24  # kinds of places that are drawn
MEANINGS = {
    "load": "share of the tokens' requests that an expert gets; of no interest where every token uses all experts.",
    "importance": "share of the gate mass, the summed weights, that an expert gets.",
    "evenness": "entropy of the importance over its maximum log E: 1 when all experts get the same, 0 when one gets "
    "all.",
    "a token's entropy": "entropy of one token's own weights over log E, mean over the tokens: 0 when a token uses "
    "one expert, 1 when it mixes all alike.",
    "experts in effect": "exp of the entropy of the importance: as many equally used experts have the same entropy.",
    "divergence": "Jensen-Shannon divergence of the groups' importances over its maximum: 0 when all groups use the "
    "experts alike, 1 when they share none. What chance gives is half of the divergence of two halves of one group.",
    "similarity": "cosine of what two experts add to their place: 1 for the same direction, 0 for nothing in common.",
}


def page(report: RoutingReport) -> str:
    """Write the page.

    Args:
        report: What was measured.

    Returns:
        A whole HTML document.
    """
    sections = [
        _section("What to do", "", _advice(report)),
        _section(
            "Importance by layer and expert",
            "Share of the gate mass over the even share, one panel for each kind of place.",
            relative_legend() + _figures(importance_figures(report)),
        ),
        _section(
            "Load by layer and expert",
            "Share of the requests over the even share, of places where tokens choose among the experts.",
            _figures(load_figures(report)),
        ),
        _section("Entropy by layer", "", _figures(entropy_figure(report), two=True)),
        _section("Groups", _groups_text(report), _figures(group_figures(report), two=True)),
        _section("Over training", "", _figures(history_figures(report), two=True)),
        _section("Tokens in context", _tokens_text(report), _sentences(report.sentences)),
        _section(
            "Similarity of experts",
            "Cosine of what the experts add, of each pair; nothing to see before an expert has learned.",
            _figures(similarity_figures(report)),
        ),
        _section("What the words mean", "", _meanings()),
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">
<title>Routing of {escape(report.title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
{_head(report)}
{"".join(sections)}
</main>
</body>
</html>
"""


def _head(report: RoutingReport) -> str:
    facts = report.facts
    about = (
        ["which experts its tokens use"] if facts is None else [facts.method, f"on {facts.base_model or 'no name'}"]
    )
    total = sum(report.tokens.values())
    used = [effective_experts(own.total.importance) for own in report.places]
    sizes = sorted({own.num_experts for own in report.places})
    dead = sum(int(own.total.dead_experts) for own in report.places)
    tiles = [
        (f"{total:,}", f"tokens in {len(report.groups)} group{'s' * (len(report.groups) > 1)}"),
        (f"{len(report.places)}", f"place{'s' * (len(report.places) > 1)} with a decision"),
        (" / ".join(map(str, sizes)) if len(sizes) < 4 else f"{sizes[0]} - {sizes[-1]}", "experts at a place"),
        (f"{sum(used) / len(used):.1f}", "experts in effect"),
        (f"{known_mean(own.token_entropy for own in report.places):.2f}", "entropy of a token"),
        (f"{dead}", "experts nobody asked for"),
    ]
    if len(report.groups) > 1:
        tiles.append((f"{known_mean(report.divergences().values()):.3f}", "divergence of the groups"))
    cells = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles
    )
    equation = "" if facts is None else f"<p><code>{escape(facts.equation)}</code></p>"
    head = f"<h1>Routing of {escape(report.title)}</h1><p class='muted'>{escape(', '.join(about))}</p>"
    return f"<header>{head}{equation}<div class='tiles'>{cells}</div></header>"


def _section(title: str, text: str, body: str) -> str:
    if not body:
        return ""
    words = f"<p class='muted'>{text}</p>" if text else ""
    return f"<section><h2>{escape(title)}</h2>{words}{body}</section>\n"


def _advice(report: RoutingReport) -> str:
    cards = []
    for own in report.advice:
        field = f" <code>{escape(own.field)}</code>" if own.field and own.field not in own.action else ""
        cards.append(
            f'<article class="advice {own.tone}"><div class="tone">{TONES[own.tone]}</div>'
            f"<h3>{escape(own.title)}</h3><p>{escape(own.evidence)}.</p><p>{escape(own.action)}{field}</p>"
            f"{_place_list(own.places)}</article>"
        )
    return f"<div class='cards'>{''.join(cards)}</div>" if cards else ""


def _place_list(places: Sequence[str]) -> str:
    if not places:
        return ""
    names = ", ".join(f"<code>{escape(name)}</code>" for name in places[:60])
    more = f" and {len(places) - 60} more" if len(places) > 60 else ""
    return f"<details><summary>{len(places)} place{'s' * (len(places) > 1)}</summary><p>{names}{more}</p></details>"


def _figures(figures: Iterable[str], *, two: bool = False) -> str:
    drawn = list(figures)
    if not drawn:
        return ""
    rest = f"<p class='muted'>and {len(drawn) - MOST_FIGURES} kinds more, see numbers.json</p>"
    more = rest if len(drawn) > MOST_FIGURES else ""
    return f"<div class='figures{' two' * two}'>{''.join(drawn[:MOST_FIGURES])}</div>{more}"


def _groups_text(report: RoutingReport) -> str:
    chance = report.chance()
    by_chance = "" if chance != chance else f" Chance alone would give a divergence of {chance:.3f}."
    counts = ", ".join(f"{escape(group)} ({report.tokens[group]:,} tokens)" for group in report.groups)
    return f"{counts}.{by_chance}"


def _tokens_text(report: RoutingReport) -> str:
    places = {place for own in report.sentences for place, _ in own.weights}
    return (
        "The color and the small number of a token are those of the expert with its largest weight; the stronger the "
        f"color, the larger the weight. Shown at {len(places)} place{'s' * (len(places) > 1)}."
    )


def _sentences(sentences: Sequence[Sentence]) -> str:
    return "".join(_sentence(own) for own in sentences)


def _sentence(own: Sentence) -> str:
    lines = []
    for (place, _), weights_TE in own.weights.items():
        tokens = []
        for token, weights_E in zip(own.tokens, weights_TE, strict=True):
            expert, weight = int(weights_E.argmax()), float(weights_E.max())
            share = weight / max(float(weights_E.sum()), 1e-9)
            style = f"--e:var(--e{expert % len(EXPERTS)});--w:{min(1.0, max(0.15, share)):.2f}"
            title = escape(f"expert {expert}, weight {weight:.3f}")
            tokens.append(f'<span style="{style}" title="{title}">{escape(token)}<sub>{expert}</sub></span>')
        lines.append(f"<figcaption>{escape(place)}</figcaption><p class='tokens'>{''.join(tokens)}</p>")
    return f"<figure class='sentence'><h3>{escape(own.group)}</h3>{''.join(lines)}</figure>"


def _meanings() -> str:
    return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in MEANINGS.items())}</dl>"
