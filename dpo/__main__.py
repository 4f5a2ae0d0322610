"""``python -m dpo <stage> key=value ...``"""

import sys

from dpo.cli import main

if __name__ == "__main__":
    sys.exit(main())
