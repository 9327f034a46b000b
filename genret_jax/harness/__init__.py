"""What comparisons and ablations have in common: jobs that resume, seeds, measured rows, tables."""
