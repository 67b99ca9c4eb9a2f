"""Write the text of this Python installation as a corpus for examples. The code: megatron_salt/tools/python_corpus.py."""

import sys

from megatron_salt.tools.python_corpus import main

if __name__ == "__main__":
    sys.exit(main())
