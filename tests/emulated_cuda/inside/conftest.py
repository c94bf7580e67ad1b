"""These tests need the emulated device, which test_emulated_cuda.py gives to the process that runs them."""

import sys

if "emulated" not in sys.modules:
    collect_ignore_glob = ["*"]
