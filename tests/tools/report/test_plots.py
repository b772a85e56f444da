"""Plots are files of images, drawn where matplotlib is installed."""

from __future__ import annotations

import pytest
import torch

from moe_peft.telemetry.history import RoutingHistory
from moe_peft.telemetry.meter import Reading
from moe_peft.telemetry.statistics import RoutingStatistics
from moe_peft.tools.report import plots

SIGNATURE = b"\x89PNG"


def test_each_kind_of_numbers_has_its_image(made, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plots.draw(made, tmp_path)
    names = ["importance.png", "load.png", "entropy.png", "groups.png", "history.png", "similarity.png"]
    assert [path.name for path in paths] == names
    assert all(path.read_bytes()[:4] == SIGNATURE and path.stat().st_size > 5000 for path in paths)


def test_without_matplotlib_the_page_is_written_and_plots_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    assert made.save(tmp_path / "report").is_file()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        made.save(tmp_path / "other", plots=True)
    assert not (tmp_path / "other").exists()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plots.draw(made, tmp_path)


def test_the_end_of_a_history_is_drawn_beside_it(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert plots.draw_history(tmp_path) is None
    history = RoutingHistory()
    statistics = RoutingStatistics(torch.ones(3), torch.tensor([1.0, 2.0, 1.0]), torch.tensor(4.0), torch.tensor(2.0))
    history.append(5, Reading({("model.layers.0.up", "default"): statistics}, {}))
    history.save(tmp_path)
    assert plots.draw_history(tmp_path) == tmp_path / "routing.png"
    assert (tmp_path / "routing.png").read_bytes()[:4] == SIGNATURE
    (tmp_path / "routing.png").unlink()
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    assert plots.draw_history(tmp_path) is None
