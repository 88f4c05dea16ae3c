"""The command line: `torchrun --nproc-per-node 8 -m shardproof prove my_train:build --steps 2`."""

import sys

from shardproof._prove.command import main

if __name__ == "__main__":
    sys.exit(main())
