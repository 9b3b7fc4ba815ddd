"""Images in: sources, reading, transforms, augmentation, loading."""
