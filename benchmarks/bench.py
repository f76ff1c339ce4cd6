#!/usr/bin/env python3
"""The same as `cutloss bench`, from a checkout whose package was built."""

import sys

from cutloss.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
