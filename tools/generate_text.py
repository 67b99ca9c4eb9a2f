"""Let a checkpoint continue a prompt; installed as salt-generate. The code: megatron_salt/tools/generate_text.py."""

import sys

from megatron_salt.tools.generate_text import main

if __name__ == "__main__":
    sys.exit(main())
