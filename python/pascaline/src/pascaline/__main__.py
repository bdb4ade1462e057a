"""Entry point: hands the arguments to the command line."""

import sys

from pascaline.cli import main

if __name__ == "__main__":
    sys.exit(main())
