"""Plots are files of images, drawn where matplotlib is installed."""

from __future__ import annotations

import pytest

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
