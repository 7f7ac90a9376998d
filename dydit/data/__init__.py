"""Training data: small sets that ship with dydit, and folders that `dydit prepare` makes."""
