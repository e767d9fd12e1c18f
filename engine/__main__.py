"""`python -m clip_finetune.engine` is the command `clip-finetune`."""

import sys

from .cli import main

sys.exit(main())
