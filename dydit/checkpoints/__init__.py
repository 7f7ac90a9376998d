"""Reading checkpoints of every common layout safely, and writing our own."""
