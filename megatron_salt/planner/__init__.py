"""The planner: will a run fit its GPUs, before it waits in a queue."""
