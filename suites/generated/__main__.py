"""`python -m generated`: see `generated.command`."""

import sys

from generated.command import main
from harness.system import pipes

sys.exit(pipes.run(main))
