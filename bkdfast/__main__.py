"""`python -m bkdfast`."""

import sys

from bkdfast.cli import main

sys.exit(main())
