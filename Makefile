PYTHON ?= .venv/bin/python

.PHONY: conformance

conformance:  ## peft's own test files, fetched for the installed release, with our adapter types
	$(PYTHON) -m pytest -m conformance -n 2 tests/conformance
