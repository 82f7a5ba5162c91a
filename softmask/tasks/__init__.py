"""What a method is to the trainer, the evaluation and the report."""
