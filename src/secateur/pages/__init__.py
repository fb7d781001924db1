"""Pages: results of any commands, compared and drawn; plain data only, never a model."""
