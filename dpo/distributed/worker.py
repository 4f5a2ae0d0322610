"""One process of a stage that several do together: started by ``dpo.distributed.launch``.

What takes long to import is imported once Ctrl-C, which the launcher passes on, ends it quietly;
the launcher reports it.
"""

import os
import signal
import sys
from pathlib import Path

_INTERRUPTED = 130


def main() -> int:
    """Do what the job's file says; returns the exit code."""
    usual = signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dpo.distributed import work

    try:
        signal.signal(signal.SIGINT, usual)
        return work.main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        return _INTERRUPTED


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # threads of a failed process may wait for others that are gone
    os._exit(code)
