"""Quickstart: from trained weights to pictures and a report, on the CPU."""
