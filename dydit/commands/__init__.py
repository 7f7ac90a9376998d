"""The commands, one file each: a command parses its options, calls a function of another room, and prints the result.

Shared by them: `group` (how commands are found and parsed), `options`, `vae_options`, `output` and `progress` (what is
printed), `suggestions` (which command is useful next), and `exit_codes` (how errors become one line).
"""
