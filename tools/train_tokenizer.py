"""Train a SentencePiece tokenizer; installed as salt-tokenizer. The code: megatron_salt/tools/train_tokenizer.py."""

import sys

from megatron_salt.tools.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())
