"""A published folder is whole or not there, whatever happens meanwhile."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import pytest

from sqviz.errors import Cancelled, DownloadError
from sqviz.models import cache

RACER = """
import os, sys, time
from pathlib import Path
from sqviz.models import cache
target, log = Path(sys.argv[1]), Path(sys.argv[2])
def build(folder):
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    (folder / "half").write_text("x" * 1000)
    time.sleep(float(sys.argv[3]))
    (folder / "other half").write_text("y" * 1000)
cache.publish(target, build, 10_000, lambda: None)
assert cache.is_whole(target) and (target / "other half").read_text() == "y" * 1000
"""


def racer(target, log, seconds):
    return subprocess.Popen([sys.executable, "-c", RACER, str(target), str(log), str(seconds)])


def nothing_left(parent):
    return [path.name for path in parent.iterdir() if not path.name.endswith(".lock")] == []


def test_four_processes_at_once_build_it_once(tmp_path):
    target, log = tmp_path / "model", tmp_path / "log"
    children = [racer(target, log, 0.5) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0, 0, 0, 0]
    assert len(log.read_text().split()) == 1
    assert sorted(path.name for path in target.iterdir()) == ["files.txt", "half", "other half"]


def test_a_killed_process_leaves_no_half_folder_and_the_next_one_cleans_up(tmp_path):
    target, log = tmp_path / "model", tmp_path / "log"
    child = racer(target, log, 60)
    while not list(tmp_path.glob(".model-*.tmp/half")):
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGKILL)
    child.wait(10)
    assert not target.exists()
    assert racer(target, log, 0).wait(60) == 0
    assert list(tmp_path.glob(".model-*.tmp")) == []


def test_a_file_that_lost_a_byte_is_made_anew(tmp_path):
    made = []

    def build(folder):
        made.append(folder)
        (folder / "weights").write_bytes(b"12345")

    cache.publish(tmp_path / "model", build, 10, lambda: None)
    cache.publish(tmp_path / "model", build, 10, lambda: None)
    assert len(made) == 1
    (tmp_path / "model" / "weights").write_bytes(b"1234")
    assert not cache.is_whole(tmp_path / "model")
    cache.publish(tmp_path / "model", build, 10, lambda: None)
    assert len(made) == 2
    assert (tmp_path / "model" / "weights").read_bytes() == b"12345"


def test_too_little_disk_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(DownloadError, match=r"5 MB free.*needs 740 MB.*SQVIZ_CACHE") as raised:
        cache.publish(tmp_path / "model", lambda folder: pytest.fail("must not start"), 740_000_000, lambda: None)
    assert str(tmp_path) in str(raised.value)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_while_writing(tmp_path, code):
    def build(folder):
        (folder / "weights").write_bytes(b"half of it")
        raise OSError(code, os.strerror(code))

    with pytest.raises(DownloadError, match="the disk is full"):
        cache.publish(tmp_path / "model", build, 10, lambda: None)
    assert nothing_left(tmp_path)


def test_any_other_failure_passes_through_and_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "weights").write_bytes(b"half of it")
        raise PermissionError(errno.EACCES, "no")

    with pytest.raises(PermissionError):
        cache.publish(tmp_path / "model", build, 10, lambda: None)
    assert nothing_left(tmp_path)


def test_waiting_for_another_process_can_be_cancelled(tmp_path):
    log = tmp_path / "log"
    child = racer(tmp_path / "model", log, 60)
    try:
        while not log.exists():
            time.sleep(0.02)

        def give_up():
            raise Cancelled("enough")

        with pytest.raises(Cancelled):
            cache.publish(tmp_path / "model", lambda folder: None, 10, give_up)
    finally:
        child.kill()
        child.wait()


def test_the_cache_directory_can_be_moved(monkeypatch, tmp_path):
    monkeypatch.setenv("SQVIZ_CACHE", str(tmp_path / "elsewhere"))
    assert cache.cache_dir() == tmp_path / "elsewhere"
    monkeypatch.delenv("SQVIZ_CACHE")
    assert cache.cache_dir().name == "sqviz"
