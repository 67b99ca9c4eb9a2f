"""Import open models, export trained ones; installed as salt-convert. The code: megatron_salt/tools/convert_checkpoint.py."""

import sys

from megatron_salt.tools.convert_checkpoint import main

if __name__ == "__main__":
    sys.exit(main())
