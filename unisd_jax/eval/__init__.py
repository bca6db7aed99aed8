"""What a model can do before and after training."""
