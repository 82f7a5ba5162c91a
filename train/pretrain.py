"""Pre-train SoftMask++, ALBEF, SyCoCa or CoCa: `deepspeed train/pretrain.py --config FILE [key=value ...]`."""

import sys

from softmask.training.pretrain import main

if __name__ == "__main__":
    sys.exit(main())
