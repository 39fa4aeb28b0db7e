"""Processes that are really killed, and a stand-in for the engine."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import traceback
import warnings

import torch

SHAPE = (3, 2, 4)
RUNNING = set()


def compute(unit, advance=None):
    """Tensors that depend on the unit only."""
    scores = torch.randn(SHAPE, generator=torch.Generator().manual_seed(unit), dtype=torch.float64)
    return {"scores": scores, "baseline": scores[0, :1].float()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def fork(function, *args):
    """Run a function in a forked process; returns its process id."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads, which are idle here
        process = os.fork()
    if process:
        RUNNING.add(process)
        return process
    status = 1
    try:
        function(*args)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait(process, seconds=60):
    """Exit status, negative for a signal; a process that hangs is killed."""
    end = time.monotonic() + seconds
    while not (found := os.waitpid(process, os.WNOHANG))[0]:
        if time.monotonic() > end:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            RUNNING.discard(process)
            raise AssertionError(f"the process has not ended in {seconds} s")
        time.sleep(0.002)
    RUNNING.discard(process)
    return os.waitstatus_to_exitcode(found[1])


def end_all():
    """Kill the processes that a failed test has left."""
    while RUNNING:
        process = RUNNING.pop()
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def trace_lines(files, each_line):
    """Call `each_line` before every line of these source files that this process runs."""

    def local(frame, event, arg):
        if event == "line":
            each_line()
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code.co_filename in files else None)


def kill_at_line(files, number):
    """SIGKILL this process before the given line."""
    left = number

    def count():
        nonlocal left
        left -= 1
        if left <= 0:
            os.kill(os.getpid(), signal.SIGKILL)

    trace_lines(files, count)


def start(script, folder, *arguments):
    """Run a script's text, kept in `folder`, in a Python of its own."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(script))
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(file), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finished(process):
    """What a script printed; it has to succeed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out.strip()


def wait_for_units(folder, count, process):
    """Until a store in `folder / "out"` has so many finished units."""
    deadline = time.monotonic() + 90
    while len(list((folder / "out").glob("unit-*"))) < count:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[1]
        time.sleep(0.01)
