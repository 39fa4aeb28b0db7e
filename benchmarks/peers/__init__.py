"""The sweep of `benchmarks/sweep_task.py` in other libraries, each in an environment of its own."""
