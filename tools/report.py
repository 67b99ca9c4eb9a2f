"""Compare runs by their logs, as a table, a curve and a picture; installed as salt-report. The code: megatron_salt/tools/report.py."""

import sys

from megatron_salt.tools.report import main

if __name__ == "__main__":
    sys.exit(main())
