"""A fixed number of threads, so that what is equal to the bit stays so while other programs run; and no downloads."""

import os


def pytest_configure(config) -> None:
    """One thread in each of several processes, before any of them imports torch or huggingface_hub."""
    parallel = hasattr(config, "workerinput") or getattr(config.option, "numprocesses", None)
    os.environ.setdefault("OMP_NUM_THREADS", "1" if parallel else str(os.cpu_count()))
    os.environ["HF_HUB_OFFLINE"] = "1"  # but from the stand-in, tests/hub.py
