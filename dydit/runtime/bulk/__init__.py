"""Bulk sampling: runs of any size into a folder, by any number of workers, resumable at any moment."""
