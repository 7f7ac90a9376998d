"""Where `dydit prepare` takes images from: one module for each kind of source, and how a kind is recognised."""
