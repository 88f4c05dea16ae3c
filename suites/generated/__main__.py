"""`python -m generated`: see `generated.command`."""

import sys

from generated.command import main

sys.exit(main())
