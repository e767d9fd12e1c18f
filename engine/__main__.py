"""`python -m clip_finetune.engine` is the command `clip-finetune`."""

import sys

from .cli.main import main

sys.exit(main())
