"""What a model is worth: features, few-shot classifiers, metrics."""
