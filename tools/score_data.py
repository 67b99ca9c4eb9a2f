"""Let a teacher score the windows of the training data; installed as salt-score. The code: megatron_salt/tools/score_data.py."""

import sys

from megatron_salt.tools.score_data import main

if __name__ == "__main__":
    sys.exit(main())
