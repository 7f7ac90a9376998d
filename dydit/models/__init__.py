"""The Diffusion Transformer, its routers, and the checkpoints that hold it."""
