"""What every test runs under."""

import os

# Tests run side by side, one in each process; threads of several processes on the same cores only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
