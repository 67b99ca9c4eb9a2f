"""Predict the memory of a run before it is queued; installed as salt-plan. The code: megatron_salt/planner/command.py."""

import sys

from megatron_salt.planner.command import main

if __name__ == "__main__":
    sys.exit(main())
