"""Turn text into a training dataset; installed as salt-preprocess. The code: megatron_salt/tools/preprocess_data.py."""

import sys

from megatron_salt.tools.preprocess_data import main

if __name__ == "__main__":
    sys.exit(main())
