"""Reports: results as plain data, as text, as pictures and as HTML."""
