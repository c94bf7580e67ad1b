#!/usr/bin/env python3
"""`llamalora eval` out of a clone: `python eval.py`, or under torchrun for several processes."""

from llamalora.cli import run_command
from llamalora.commands.eval import main

if __name__ == "__main__":
    run_command(main)
