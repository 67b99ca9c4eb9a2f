"""Turn a public data set into a task file; installed as salt-prepare-task. The code: megatron_salt/tools/prepare_task.py."""

import sys

from megatron_salt.tools.prepare_task import main

if __name__ == "__main__":
    sys.exit(main())
