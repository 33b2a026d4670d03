"""A notebook-first, reproducible companion to synthetic face recognition."""
__version__ = "0.1.0"
