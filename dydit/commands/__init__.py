"""The commands: one file each, whose functions parse, call one function of another room, and print."""
