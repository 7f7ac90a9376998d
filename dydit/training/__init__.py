"""Fine-tuning a DiT into a DyDiT: data, losses, recipes, the loop, and the evaluation of what it made."""
