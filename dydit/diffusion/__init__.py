"""The diffusion process: schedule, step coefficients, noise. Plain NumPy, used by all other parts."""
