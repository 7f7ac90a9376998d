"""From samples to pictures: pixels, files, and the VAE decoder."""
