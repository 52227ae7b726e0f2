import sys

from vlm_local.cli import main

sys.exit(main())
