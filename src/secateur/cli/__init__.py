"""The command line: flags to arguments, results to tables or JSON, errors to exit codes. Nothing is computed here."""
