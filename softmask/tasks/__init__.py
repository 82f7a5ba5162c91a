"""Tasks: the interface between a method and the trainer, the evaluation and the report."""
