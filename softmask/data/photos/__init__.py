"""Generated scenes of photographic cut-outs with captions: `python -m softmask.data.photos --out DIR --root ROOT`."""
