import sys

from cutloss.cli import main

sys.exit(main())
