"""These tests need a CUDA device, which test_emulated_cuda.py gives to the process that runs them."""

import sys

if "emulated" not in sys.modules:
    collect_ignore_glob = ["*"]
elif "actual" in sys.modules:  # which does not count operations and bytes as these want it
    collect_ignore = ["test_budgets.py", "test_device.py", "test_plan.py"]
