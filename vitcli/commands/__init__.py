"""What each command does: `run(...)` gives a result object. Commands never import each other."""
