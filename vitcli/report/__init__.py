"""HTML reports: one self-contained page in one style, and the charts on it."""
