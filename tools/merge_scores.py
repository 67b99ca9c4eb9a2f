"""Merge the shards of a teacher-score index; installed as salt-merge-scores. The code: megatron_salt/tools/merge_scores.py."""

import sys

from megatron_salt.tools.merge_scores import main

if __name__ == "__main__":
    sys.exit(main())
