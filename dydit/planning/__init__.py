"""Decides which subnetworks a run has: masks of the steps, plans, their costs and sizes, and measured costs."""
