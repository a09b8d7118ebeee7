"""The leak detector: each kind of leak is found, and cleaned up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers import leaks
from tests.helpers.leaks import MARK, no_leaks, session_processes


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(leaks, "PATIENCE_SECONDS", 0.1)


def test_a_clean_body_passes(tmp_path):
    (tmp_path / "old").touch()
    with no_leaks(tmp_path):
        os.environ["A_VARIABLE"] = "1"
        del os.environ["A_VARIABLE"]
        subprocess.run(["true"], check=True)
        thread = threading.Thread(target=time.sleep, args=(0.02,))
        thread.start()  # ends soon


def test_an_exception_of_the_body_is_not_hidden(tmp_path):
    def body():
        os.environ["A_VARIABLE"] = "1"
        raise KeyError("the body's")

    with pytest.raises(KeyError, match="the body's"), no_leaks(tmp_path):
        body()
    assert "A_VARIABLE" not in os.environ


def test_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("AN_OLD_ONE", "before")
    with (
        pytest.raises(AssertionError, match="variable AN_OLD_ONE=after; environment variable A_VARIABLE=1"),
        no_leaks(tmp_path),
    ):
        os.environ.update(A_VARIABLE="1", AN_OLD_ONE="after")
    assert "A_VARIABLE" not in os.environ
    assert os.environ["AN_OLD_ONE"] == "before"


def test_excused_variables_are_put_back(tmp_path, monkeypatch):
    monkeypatch.delenv("MASTER_PORT", raising=False)
    with no_leaks(tmp_path):
        os.environ["MASTER_PORT"] = "1"
    assert "MASTER_PORT" not in os.environ


def test_working_directory(tmp_path):
    before = Path.cwd()
    with pytest.raises(AssertionError, match="working directory"), no_leaks(tmp_path):
        os.chdir(tmp_path)
    assert Path.cwd() == before


def test_process_group(tmp_path):
    with pytest.raises(AssertionError, match="process group"), no_leaks(tmp_path):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert not dist.is_initialized()


def test_child_process(tmp_path):
    with pytest.raises(AssertionError, match=r"process \d+ \(sleep 60\)"), no_leaks(tmp_path):
        child = subprocess.Popen(["sleep", "60"])
    assert child.wait() < 0


def test_orphan(tmp_path):
    """A process in its own session whose parent is gone, as a killed launcher leaves it."""
    start = (
        "from subprocess import DEVNULL, Popen\n"
        "print(Popen(['sleep', '60'], start_new_session=True, stdout=DEVNULL, stderr=DEVNULL).pid)"
    )
    with pytest.raises(AssertionError, match=r"process \d+ \(sleep 60\)"), no_leaks(tmp_path):
        orphan = int(subprocess.run([sys.executable, "-c", start], check=True, capture_output=True).stdout)
    assert orphan not in session_processes()


def test_thread(tmp_path):
    stop = threading.Event()
    with pytest.raises(AssertionError, match="thread forgotten"), no_leaks(tmp_path):
        threading.Thread(target=stop.wait, name="forgotten", daemon=True).start()
    stop.set()


def test_file(tmp_path):
    with pytest.raises(AssertionError, match="file lightning_logs"), no_leaks(tmp_path):
        (tmp_path / "lightning_logs").mkdir()


def test_a_file_of_somebody_at_work_is_no_leak(tmp_path):
    with no_leaks(tmp_path):
        (tmp_path / "notes.py").touch()


def test_every_test_is_watched(request):
    assert "leaves_nothing_behind" in request.fixturenames
    assert os.environ[MARK] == str(os.getpid())
