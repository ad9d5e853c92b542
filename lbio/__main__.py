"""`python -m lbio` is `ollama-lb`."""

import sys

from lbio.cli import main

sys.exit(main())
