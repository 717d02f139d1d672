"""Signals that ask a process to stop, at whatever moment they come."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys, threading
from outrider.shared.process.lifecycle import Stop

for moment in range(40):
    stop, lines = Stop(), 0
    stop.started()

    def trace(frame, event, argument):
        global lines
        lines += 1
        if lines == moment:
            os.kill(os.getpid(), signal.SIGTERM)
        return trace

    late = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGTERM))
    late.start()  # for moments after the wait has begun
    sys.settrace(trace)
    stop.wait()
    sys.settrace(None)
    late.join()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.hurried, moment
print("done")
"""


def test_stop_is_heard_at_whatever_line_of_the_wait_the_signal_comes() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "done\n", done.stderr


ANOTHER_THREAD = """
import signal, threading, time
from outrider.shared.process.lifecycle import Stop

stop = Stop()
stop.started()

def take_it() -> None:
    # /proc/self is the main thread: it sleeps in read(), where only its own signal would wake it.
    while open("/proc/self/stat").read().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.01)
    signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

threading.Thread(target=take_it, daemon=True).start()
stop.wait()
print("done")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_stop_is_heard_when_the_system_hands_the_signal_to_another_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", ANOTHER_THREAD], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "done\n", done.stderr
