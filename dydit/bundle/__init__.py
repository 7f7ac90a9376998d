"""The bundle: one folder that any backend runs. Its manifest, its graphs' inputs and outputs."""
