"""`python tests/support/pretended CARD -- COMMAND …`: see the package."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from support.pretended import main

sys.exit(main(sys.argv[1:]))
