"""The command: signals first, then everything else."""

from job.launch import main

if __name__ == "__main__":
    main()
