"""Files of downstream tasks about generated scenes: `python -m softmask.data.scenes --tasks --out DIR`."""
