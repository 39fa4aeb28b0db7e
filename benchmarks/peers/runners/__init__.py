"""How each library computes the task: `load(task)` returns a function that computes all effects once."""
