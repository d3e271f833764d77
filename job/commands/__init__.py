"""The commands beside the job itself. Each imports what it needs when it runs."""
