"""A tracker that is not there is said before a model is loaded."""

from __future__ import annotations

import pytest
from trackers import check_trackers
from transformers.integrations.integration_utils import get_available_reporting_integrations

from tests.train.tiny_run import make_base, make_data, run_here, words, write_run


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["tensorbord"], r"--report_to 'tensorbord' is no tracker\. Did you mean tensorboard\?"),
        (["x" * 500], r"--report_to 'x+\.\.\. is no tracker\. It takes .*tensorboard.*, or none"),
    ],
)
def test_a_name_of_no_tracker_is_refused(names, message):
    with pytest.raises(ValueError, match=message) as error:
        check_trackers(names)
    assert len(str(error.value)) < 500


def test_a_tracker_that_is_not_installed_is_refused_before_a_model_is_loaded(tmp_path):
    missing = next(
        name for name in ("clearml", "comet_ml", "wandb") if name not in get_available_reporting_integrations()
    )
    make_base(tmp_path / "base")
    (tmp_path / "base/model.safetensors").unlink()
    data = make_data(tmp_path / "data", [{"text": words(i, 5)} for i in range(4)])
    run = write_run(tmp_path, model_name_or_path=str(tmp_path / "base"), dataset_name=data, report_to=missing)
    with pytest.raises(ValueError, match=f"--report_to {missing}: .*Install it, or write --report_to none"):
        run_here("sft", run)


def test_nothing_to_report_to_and_what_is_installed_are_taken():
    check_trackers([])
    check_trackers([name for name in get_available_reporting_integrations() if name == "tensorboard"])
