"""Training, evaluation and reports: scripts to run, installed as `softmask.train`."""
