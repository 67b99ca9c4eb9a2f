"""Evaluate checkpoints on likelihood tasks; installed as salt-evaluate. The code: megatron_salt/tools/evaluate.py."""

import sys

from megatron_salt.tools.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
