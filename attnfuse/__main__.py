"""`python -m attnfuse`."""

import sys

from attnfuse.cli.main import main

sys.exit(main())
