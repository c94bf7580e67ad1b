"""The paper: its tables as printed, its experiments run again, verdicts on its claims."""
