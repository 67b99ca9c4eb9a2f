"""Choose stage 1's samples by a teacher's scores; installed as salt-select. The code: megatron_salt/tools/select_data.py."""

import sys

from megatron_salt.tools.select_data import main

if __name__ == "__main__":
    sys.exit(main())
