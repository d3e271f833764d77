"""What clipjob promises about speed and memory, measured: see README.md."""
