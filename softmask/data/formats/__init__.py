"""Files of downstream tasks, as their data sets and ALBEF have them: one reader per task."""
