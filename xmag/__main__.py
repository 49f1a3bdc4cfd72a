"""``python -m xmag`` is the command ``xmag``."""

import sys

from xmag.cli import main

sys.exit(main())
