"""What every test runs under."""

import os
import signal

# Tests run side by side, one in each process; threads of several processes on the same cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with SIGINT ignored, which children inherit; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
