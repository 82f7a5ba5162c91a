"""Generated scenes of OpenMoji drawings with captions: `python -m softmask.data.scenes --out DIR`."""
