"""clipjob: fine-tune an OpenCLIP model as a batch job that can be killed at any moment."""

__version__ = "0.1.0"
