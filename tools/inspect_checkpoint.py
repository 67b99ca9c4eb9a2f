"""Print what is inside a checkpoint; installed as salt-inspect. The code: megatron_salt/tools/inspect_checkpoint.py."""

import sys

from megatron_salt.tools.inspect_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
