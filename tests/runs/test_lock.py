import os
import signal
import socket
import subprocess
import sys

import pytest

from genscale.runs.lock import locked
from genscale.runtime.errors import UserError

HOLD = "import sys, pathlib, time\nfrom genscale.runs.lock import locked\nwith locked(pathlib.Path(sys.argv[1])):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(60)\n"


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of ``tmp_path``."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_told_who_holds_the_directory(tmp_path, holder):
    message = f"another process (pid {holder.pid} on {socket.gethostname()}) is using {tmp_path}"
    with pytest.raises(UserError) as caught, locked(tmp_path):
        pass
    assert str(caught.value) == message


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    with locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"pid {os.getpid()} on {socket.gethostname()}\n"


def test_the_lock_is_free_after_the_block_even_when_it_raises(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    with locked(tmp_path), pytest.raises(UserError, match=f"pid {os.getpid()}"), locked(tmp_path):
        pass
