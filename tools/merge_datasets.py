"""Join datasets into one; installed as salt-merge. The code: megatron_salt/tools/merge_datasets.py."""

import sys

from megatron_salt.tools.merge_datasets import main

if __name__ == "__main__":
    sys.exit(main())
