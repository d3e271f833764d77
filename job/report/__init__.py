"""A run as one HTML page, and several side by side. Needs neither torch nor images: all comes from the run's own small files."""
