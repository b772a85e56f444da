"""A reader and a killed writer meet the old file or the new one, never half of one."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from moe_peft import files
from moe_peft.files import filled_folder, new_folder, replacing, write_text

# Runs the file by itself, as the package takes seconds to import.
WRITER = f"""
import itertools, json, runpy, sys
write_text = runpy.run_path({files.__file__!r})["write_text"]
print("ready", flush=True)
for number in itertools.count():
    write_text(sys.argv[1], json.dumps({{"number": number, "text": "x" * 50_000}}))
"""


def test_a_writer_that_is_killed_and_readers_beside_it_meet_whole_files(tmp_path):
    path = tmp_path / "file.json"
    write_text(path, '{"number": -1, "text": ""}')
    reads = 0
    for delay in (0.03, 0.11):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout.readline()
        end = time.monotonic() + delay
        while time.monotonic() < end or reads == 0:
            json.loads(path.read_text())
            reads += 1
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        json.loads(path.read_text())
    assert reads > 0


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


def test_permissions_are_those_of_an_ordinary_file_or_of_the_old_one(tmp_path):
    ordinary, new, old = tmp_path / "ordinary", tmp_path / "new", tmp_path / "old"
    ordinary.write_text("")
    old.write_text("")
    old.chmod(0o600)
    write_text(new, "a")
    write_text(old, "b")
    assert stat.S_IMODE(new.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)
    assert stat.S_IMODE(old.stat().st_mode) == 0o600


def test_what_a_link_points_to_is_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "file")
    write_text(tmp_path / "link", "a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "file").read_text() == "a"


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path):
    with new_folder(tmp_path / "deep/own") as growing:
        (growing / "file").write_text("whole")
        assert not (tmp_path / "deep/own").exists()
    assert (tmp_path / "deep/own/file").read_text() == "whole"
    for error in (KeyboardInterrupt, ValueError):
        with pytest.raises(error), new_folder(tmp_path / "other") as growing:
            (growing / "file").write_text("half")
            raise error
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as growing:
        (growing / "file").write_text("whole")
    assert (tmp_path / "empty/file").is_file()


def test_files_are_put_into_a_folder_together_or_not_at_all(tmp_path):
    for _ in range(2):
        with filled_folder(tmp_path / "own") as growing:
            (growing / "file").write_text("first")
            (growing / "second").write_text("first")
    (tmp_path / "own/mine").write_text("mine")
    for error in (KeyboardInterrupt, ValueError):
        for folder in ("own", "other"):
            with pytest.raises(error), filled_folder(tmp_path / folder) as growing:
                (growing / "file").write_text("half")
                raise error
    assert [path.name for path in tmp_path.iterdir()] == ["own"]
    with filled_folder(tmp_path / "own") as growing:
        (growing / "file").write_text("next")
    found = {path.name: path.read_text() for path in (tmp_path / "own").iterdir()}
    assert found == {"file": "next", "second": "first", "mine": "mine"}


def test_a_place_with_files_is_refused_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place, message in ((tmp_path, "holds files"), (tmp_path / "file", "is a file")):
        with pytest.raises(ValueError, match=message), new_folder(place):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
