"""`python -m dicomnode` is the same as `dicomnode`."""

import sys

from dicomnode.cli import main

sys.exit(main())
