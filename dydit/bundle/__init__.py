"""The bundle: one folder that any backend runs. Its manifest, and the inputs and outputs of its graphs."""
