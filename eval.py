#!/usr/bin/env python3
"""`llamalora eval` out of a clone: `python eval.py --run RUN`, or in several processes: torchrun --nproc_per_node 4 --
eval.py --run RUN (without the `--` torchrun takes --run for a flag of its own)."""

from llamalora.cli import run_command
from llamalora.commands.eval import main

if __name__ == "__main__":
    run_command(main)
