"""What a training step calls: modules that return the loss."""
