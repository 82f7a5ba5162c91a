"""Write the report of a run: `python train/report.py RUN --data SHARDS`."""

import sys

from softmask.cli import run

if __name__ == "__main__":
    sys.exit(run("report"))
