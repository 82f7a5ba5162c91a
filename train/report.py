"""Write the report of a run: `python train/report.py RUN --data SHARDS`."""

import sys

from softmask.report.build import main

if __name__ == "__main__":
    sys.exit(main())
