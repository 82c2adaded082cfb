"""A run in a process of its own, and Ctrl-C."""

import signal
import sys
from pathlib import Path

import pytest

from randlora.errors import RandLoraError
from randlora.train.own_process import run_python

CHILD = """
import json, signal, sys, time
mark, = sys.argv[1:]
def asked(*_):
    open(mark, "a").write("asked once\\n")
    time.sleep(0.3)  # a checkpoint
    open(mark, "a").write("written\\n")
    sys.exit(130)
signal.signal(signal.SIGINT, asked)
open(mark, "w").write("begun\\n")
if mark.endswith("wait"):
    time.sleep(60)
print(json.dumps({"mark": mark}))
sys.exit(mark.endswith("fail"))
"""


@pytest.fixture
def child(tmp_path, monkeypatch) -> Path:
    (tmp_path / "child_of_a_test.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_the_result_is_what_it_prints(child):
    assert run_python("child_of_a_test", str(child / "x")) == {"mark": str(child / "x")}


def test_a_failure_is_named(child):
    with pytest.raises(RandLoraError, match=r"child_of_a_test .*fail` ended with code 1"):
        run_python("child_of_a_test", str(child / "fail"))


@pytest.mark.skipif(sys.platform == "win32", reason="has no alarms")
def test_ctrl_c_reaches_it_once_and_is_waited_for(child):
    mark = child / "wait"

    def interrupt(*_):
        if mark.exists():
            raise KeyboardInterrupt
        signal.setitimer(signal.ITIMER_REAL, 0.1)

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_python("child_of_a_test", str(mark))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert mark.read_text().split("\n") == ["begun", "asked once", "written", ""]
