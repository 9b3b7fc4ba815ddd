"""What a model looks at: the paper's figures, numbers first, then pictures."""
