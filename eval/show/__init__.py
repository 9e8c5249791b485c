"""What shows an evaluation: the report of a run and the comparison of several, with their charts and pictures."""
