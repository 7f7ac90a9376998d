"""How numbers are represented in 8 bits: scales, rounding and smoothing."""
