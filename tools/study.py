"""Run, resume or report a study of arms x seeds, as STUDY.yaml says; installed as salt-study. The code: megatron_salt/study/command.py."""

import sys

from megatron_salt.study.command import main

if __name__ == "__main__":
    sys.exit(main())
