"""HTML pages of evaluations: the report of one run and the comparison of several, with charts and pictures."""
