"""Runs the suite with `-m conformance` only, and compares what does not pass with the list in skips.py."""

import os
import re
from pathlib import Path

import pytest
import torch

from . import sources
from .skips import SKIPS, Skip

COLLECTED = pytest.StashKey[list[str]]()


def _selected(config: pytest.Config) -> bool:
    return re.search(r"(?<!not )\bconformance\b", config.option.markexpr) is not None


def pytest_configure(config):
    if _selected(config):
        # peft's tests name models on the Hub in places that none of ours reach.
        os.environ["HF_HUB_OFFLINE"] = "1"
        for marker in ("bitsandbytes", "skipf"):
            config.addinivalue_line("markers", f"{marker}: as peft writes it")
        sources.fetch()


def pytest_ignore_collect(collection_path, config):
    return None if _selected(config) else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    ours = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in ours:
        item.add_marker(pytest.mark.conformance)
    config.stash[COLLECTED] = [_test_id(item) for item in ours if _is_from_peft(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if not _is_from_peft(item):
        return report
    entry = next((skip for skip in SKIPS if re.search(skip.tests, _test_id(item))), None)
    if report.when == "call" or report.outcome == "skipped":
        # pytest words an assertion by its values; the statement says which one it is.
        message = f"{call.excinfo.exconly()}\n{call.excinfo.traceback[-1].statement}" if call.excinfo else ""
        _compare(report, message, entry)
    return report


def _compare(report: pytest.TestReport, message: str, entry: Skip | None) -> None:
    if entry is None:
        if report.outcome == "skipped":
            report.outcome, report.longrepr = "failed", f"The test skips itself, but skips.py has no entry: {message}"
    elif report.outcome == "passed":
        report.outcome, report.longrepr = "failed", f"The test passes: remove it from the entry {entry.tests!r}"
    elif entry.outcome in message:
        path, line, _ = report.location
        report.outcome, report.longrepr = "skipped", (path, line or 0, entry.reason)
    else:
        report.outcome = "failed"
        report.sections.append(("skips.py", f"The entry {entry.tests!r} expects {entry.outcome!r}."))


def _is_from_peft(item: pytest.Item) -> bool:
    return item.path.stem.startswith("test_peft_")


def _test_id(item: pytest.Item) -> str:
    return f"{item.path.stem}::{item.name}"


@pytest.fixture(autouse=True)
def seed():
    """Initialise adapters alike in every run; some of peft's tests compare what a few training steps change."""
    torch.manual_seed(0)


@pytest.fixture
def collected(request):
    """Ids of all collected tests of peft, also of those that -k leaves out."""
    return request.config.stash[COLLECTED]
