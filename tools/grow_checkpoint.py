"""Stack a trained model to a deeper one; installed as salt-grow. The code: megatron_salt/convert/grow_command.py."""

import sys

from megatron_salt.convert.grow_command import main

if __name__ == "__main__":
    sys.exit(main())
