"""Train models with differential privacy and never lose count of what that cost."""
