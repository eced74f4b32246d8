"""A fixed number of threads, so that what is equal to the bit stays so while other programs run."""

import os

IN_PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
os.environ.setdefault("OMP_NUM_THREADS", "1" if IN_PARALLEL else str(os.cpu_count()))  # before torch is imported
