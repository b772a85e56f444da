"""A process that fails or hangs ends its group, and the message says which one and where."""

import sys
import time

import pytest

from tests.processes.together import run_together

HANGS = [sys.executable, "-c", "import time\ndef stuck():\n    time.sleep(100)\nstuck()"]
FAILS = [sys.executable, "-c", "raise SystemExit('no such case')"]
ENDS = [sys.executable, "-c", "pass"]


def test_processes_that_end_well_say_nothing():
    run_together([ENDS, ENDS])


def test_the_failure_of_one_ends_the_others_at_once():
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)was still running.*ended with 1:\nno such case"):
        run_together([HANGS, FAILS])
    assert time.monotonic() - start < 60


def test_a_process_that_hangs_says_where():
    with pytest.raises(AssertionError, match=r"(?s)ended with 0.*was still running.*line 3 in stuck"):
        run_together([ENDS, HANGS], timeout=3)
