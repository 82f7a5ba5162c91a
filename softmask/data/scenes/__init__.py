"""Captioned scenes of OpenMoji drawings: `python -m softmask.data.scenes --out DIR`."""
