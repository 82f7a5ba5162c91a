"""Pre-train SoftMask++, ALBEF, SyCoCa or CoCa: `deepspeed train/pretrain.py --config FILE [key=value ...]`."""

import sys

from softmask.cli import run

if __name__ == "__main__":
    sys.exit(run("pretrain"))
