"""Which subnetworks a run has: masks over the steps, plans, their costs and sizes, and costs measured here."""
