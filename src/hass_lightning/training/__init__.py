"""Training with PyTorch Lightning: module, callbacks, strategies, loggers, budgets."""
