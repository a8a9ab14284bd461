"""Which rows of the matrix run on which platforms, and what proves it."""
