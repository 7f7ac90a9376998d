"""A regular package: torch-fidelity installs one of this name, which would hide a package without this file."""
