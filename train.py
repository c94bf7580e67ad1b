#!/usr/bin/env python3
"""`llamalora train` out of a clone: `python train.py`, or under torchrun for several processes."""

from llamalora.cli import run_command
from llamalora.commands.train import main

if __name__ == "__main__":
    run_command(main)
