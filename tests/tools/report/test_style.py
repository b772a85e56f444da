"""Both themes have a color for every step, and text stands out from its ground (WCAG 2.2, 1.4.3)."""

from __future__ import annotations

import re

import pytest

from moe_peft.tools.report.style import DARK, LIGHT, STYLE
from moe_peft.tools.report.svg import STEPS


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [0, 1])
def test_text_can_be_read_in_both_themes(theme):
    block = STYLE.split("@media (prefers-color-scheme: dark)")[theme]
    colors = dict(re.findall(r"--(\w+):(#\w{6})", block))
    for ground in ("bg", "card"):
        for text in ("fg", "muted", "good", "note", "act"):
            assert contrast(colors[text], colors[ground]) >= 4.5, (text, ground)


def test_every_step_has_a_color_in_both_themes():
    assert len(LIGHT) == len(DARK) == STEPS == len(set(LIGHT)) == len(set(DARK))
