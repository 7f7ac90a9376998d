"""Backends execute a bundle's subnetworks. `registry` finds them by name; `base` is the contract of each."""
